"""The data path at its true size: index to split of the published experiment, by `dvc repro`.

    python -m benchmarks.data_path

The bucket is that of benchmarks/true_bucket.py: as large as the real one, and with its latency. The
repository is cloned into a temporary folder, which takes 17 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from benchmarks import common
from benchmarks.dvc_operations import in_bytes
from benchmarks.measured import COUNTS, MEASURES, Measure
from benchmarks.true_bins import PADDED
from benchmarks.true_bucket import COUNTS_PATH, serving_true_bucket
from stages.imaging.loader import CPU
from tests.project import Project

PACKAGES = ["dvc", "obstore", "pyarrow", "simplejpeg", "torch", "uvloop"]
STAGES = ["index", "subset", "fetch", "resize", "split"]
OUTPUTS = {
    "index": ["data/index.parquet", "data/index.json"],
    "subset": ["data/subset.parquet"],
    "fetch": ["data/raw", "data/unfetched.csv"],
    "resize": ["data/resized", "data/quarantine.csv"],
    "split": ["data/split.csv", "data/split.json"],
}
# A `python` that measures the stage it runs.
MEASURING_PYTHON = """\
#!/bin/sh
PYTHONPATH="{root}" exec "{python}" -m benchmarks.measured "$@"
"""


class Command(NamedTuple):
    """A DVC command, and the stages that it ran."""

    what: str
    seconds: float
    stages: list[Measure]


def measured_project(folder: Path, url: str) -> Project:
    project = Project(folder / "project", url)
    programs = folder / "bin"
    programs.mkdir()
    text = MEASURING_PYTHON.format(root=common.ROOT, python=sys.executable)
    (programs / "python").write_text(text, "utf-8")
    (programs / "python").chmod(0o755)
    environment = project.environment
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    environment[MEASURES] = str(folder / "measures")
    environment[COUNTS] = f"{url}{COUNTS_PATH}"
    return project


def run(project: Project, what: str, *command: str) -> Command:
    """Run a command with its output on the terminal, and measure it."""
    measures = Path(project.environment[MEASURES])
    measures.write_text("", "utf-8")
    print(f"$ {' '.join(command)}", flush=True)
    whole = Measure.of(command, project.folder, project.environment)
    stages = [Measure(**json.loads(line)) for line in measures.read_text("utf-8").splitlines()]
    return Command(what, whole.seconds, stages)


def run_all(project: Project, photographs: int) -> list[Command]:
    test = photographs // 10
    sizes = [
        f"subset.bins={photographs}",
        f"split.train={photographs - test - test // 2}",
        f"split.validation={test // 2}",
        f"split.test={test}",
    ]
    settings = [f"bucket.endpoint={project.environment[COUNTS].removesuffix(COUNTS_PATH)}", *sizes]
    words = [word for setting in settings for word in ("--set-param", setting)]
    first = run(project, "the first run", "dvc", "exp", "run", *words, "split")
    project.run("git", "add", ".")
    project.run("git", "commit", "--quiet", "--message", "A run")
    again = run(project, "nothing changed", "dvc", "repro", "split")
    seed = ["dvc", "exp", "run", "--set-param", "split.seed=1", "split"]
    return [first, again, run(project, "another `split.seed`", *seed)]


def stages_table(project: Project, measures: Sequence[Measure]) -> str:
    """A row for each stage, also with the size of its outputs."""
    rows = []
    for name, measure in zip(STAGES, measures, strict=True):
        paths = [project.folder / output for output in OUTPUTS[name]]
        size = sum(
            file.stat().st_size
            for path in paths
            for file in [path, *path.rglob("*")]
            if file.is_file()
        )
        rows.append(
            [
                f"`{name}`",
                common.rounded(measure.seconds),
                common.rounded(measure.cpu_seconds),
                f"{measure.requests:,}",
                in_bytes(measure.peak_bytes),
                in_bytes(size),
            ]
        )
    header = ["stage", "seconds", "CPU seconds", "requests", "peak memory", "outputs"]
    return common.table(header, rows)


def commands_table(commands: Sequence[Command]) -> str:
    rows = [
        [
            command.what,
            common.rounded(command.seconds),
            common.rounded(sum(measure.seconds for measure in command.stages)),
            ", ".join(measure.stage for measure in command.stages) or "none",
            f"{sum(measure.requests for measure in command.stages):,}",
        ]
        for command in commands
    ]
    header = ["`dvc repro` of index to split", "seconds", "in stages", "which ran", "requests"]
    return common.table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data_path",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--bins", type=int, default=PADDED, help=f"in the bucket (default: {PADDED})"
    )
    parser.add_argument(
        "--photographs", type=int, default=220_000, help="to fetch (default: 220000)"
    )
    parser.add_argument("--latency-ms", type=float, default=30, help="of the bucket (default: 30)")
    parser.add_argument("--folder", type=Path, help="for the clone, on a disk with enough room")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "data-path.md")
    options = parser.parse_args()
    machine = common.describe_machine(CPU, PACKAGES)
    with (
        TemporaryDirectory(prefix="bench-", dir=options.folder) as name,
        serving_true_bucket(options.bins, options.latency_ms) as url,
    ):
        project = measured_project(Path(name), url)
        commands = run_all(project, options.photographs)
        stages = stages_table(project, commands[0].stages)
    setting = (
        f"A bucket of {options.bins:,} padded ids, and un-padded ones, that answers after"
        f" {options.latency_ms:g} ms, from which {options.photographs:,} photographs are sampled."
        " Its server shares the cores; its CPU is not in the table."
        f" The load average was {os.getloadavg()[0]:.2f} at the end."
    )
    sections = {
        "": f"{machine}\n{setting}",
        "Stages": stages,
        "Commands": commands_table(commands),
    }
    common.write_report(options.out, "The data path at its true size", sections)


if __name__ == "__main__":
    main()
