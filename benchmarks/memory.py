"""The memory of each stage, and how it grows with the number of bins.

    python -m benchmarks.memory

The bucket is a small one of benchmarks/true_bucket.py, with photographs and records of true size.
Stages run as processes, one after another, as DVC would run them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from benchmarks import common
from benchmarks.dvc_operations import in_bytes
from benchmarks.measured import MEASURES, Measure
from benchmarks.true_bins import PADDED
from benchmarks.true_bucket import serving_true_bucket
from stages.imaging.loader import CPU
from tools.s3 import CLIENT_ENVIRONMENT

PACKAGES = ["obstore", "pyarrow", "pandas", "torch", "transformers", "simplejpeg", "uvloop"]
#: Photographs of the published experiment, sampled from all bins of the bucket.
PUBLISHED = 220_000
MODEL = "vit"
# A tiny network, since the memory of the data is measured.
TINY_VIT = {
    "model_type": "vit",
    "patch_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
COMMANDS = {
    "index": ["stages.index"],
    "subset": ["stages.subset"],
    "fetch": ["stages.fetch"],
    "resize": ["stages.resize"],
    "split": ["stages.split"],
    "pretrained": ["stages.pretrained", MODEL],
    "train": ["stages.train", MODEL],
    "evaluate": ["stages.evaluate", MODEL],
    "report": ["stages.report"],
}


def params(photographs: int, url: str) -> dict[str, object]:
    """The values of params.yaml, with this many photographs and a tiny network."""
    values = common.load_params()
    test = photographs // 10
    values["bucket"]["endpoint"] = url
    values["subset"]["bins"] = photographs
    values["split"] |= {"train": photographs - test, "test": test}
    values["train"][MODEL] |= {
        "pretrained": False,
        "config": TINY_VIT,
        "epochs": 1,
        "warmup_steps": 0,
    }
    return values


def measure_stages(photographs: int) -> dict[str, Measure]:
    """Run and measure the stages in the order of the pipeline."""
    bins = min(PADDED, round(photographs * PADDED / PUBLISHED))
    with TemporaryDirectory(prefix="bench-") as name, serving_true_bucket(bins) as url:
        folder = Path(name)
        (folder / "params.yaml").write_text(yaml.safe_dump(params(photographs, url)), "utf-8")
        measures = {}
        for stage, command in COMMANDS.items():
            measures[stage] = measure(folder, "-m", *command)
            print(f"{photographs} photographs: {describe(stage, measures[stage])}", flush=True)
    return measures


def measure_imports() -> dict[str, Measure]:
    """Measure only the imports of each stage."""
    with TemporaryDirectory(prefix="bench-") as name:
        measures = {}
        for stage, (module, *_) in COMMANDS.items():
            measures[stage] = measure(Path(name), "-c", f"import {module}")
            print(f"imports: {describe(stage, measures[stage])}", flush=True)
    return measures


def measure(folder: Path, *arguments: str) -> Measure:
    """Run Python from a small process, since a process inherits the peak of its parent."""
    file = folder / "measure.json"
    environment = {**os.environ, **CLIENT_ENVIRONMENT, MEASURES: str(file)}
    environment["PYTHONPATH"] = str(common.ROOT)
    Measure.of([sys.executable, "-m", "benchmarks.measured", *arguments], folder, environment)
    found = Measure(**json.loads(file.read_text("utf-8")))
    file.unlink()
    return found


def describe(stage: str, taken: Measure) -> str:
    return f"{stage}: {in_bytes(taken.peak_bytes)}, {taken.seconds:.1f} s"


def memory_table(imports: Mapping[str, Measure], sizes: Mapping[int, Mapping[str, Measure]]) -> str:
    """A row per stage: its peaks, and the memory that 1,000 more photographs add."""
    *_, smaller, larger = sizes
    rows = []
    for stage, base in imports.items():
        peaks = [measures[stage].peak_bytes for measures in sizes.values()]
        growth = (peaks[-1] - peaks[-2]) * 1000 / (larger - smaller)
        cells = [base.peak_bytes, *peaks, growth]
        rows.append([f"`{stage}`", *(f"{cell / 10**6:,.1f}" for cell in cells)])
    header = [
        "peak memory, MB",
        "imports alone",
        *(f"{size:,} photographs" for size in sizes),
        "1,000 more",
    ]
    return common.table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--photographs",
        type=int,
        nargs="+",
        default=[2_000, 8_000, 20_000],
        help="in ascending order, at least two (default: 2000 8000 20000)",
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS / "memory.md")
    options = parser.parse_args()
    machine = common.describe_machine(CPU, PACKAGES)
    imports = measure_imports()
    sizes = {photographs: measure_stages(photographs) for photographs in options.photographs}
    *_, smaller, larger = sizes
    setting = (
        "The peak resident set of each stage's process, including shared libraries."
        f" The buckets have {PADDED / PUBLISHED:.2f} times as many bins as are sampled, as in the"
        " published experiment. The network is tiny, because the memory of the data is measured; a"
        " real network adds its own in `train` and `evaluate`. With few photographs stages need"
        " less: `fetch` has 1,024 requests under way and a shard of 1,000 in memory, `evaluate` and"
        " the tests of `train` have 256 in a batch. So the growth per 1,000 photographs is taken"
        f" from the runs with {smaller:,} and {larger:,}; `data-path.md` has the memory at the true"
        " size."
    )
    sections = {
        "": f"{machine}\n{setting}",
        "Memory": memory_table(imports, sizes),
    }
    common.write_report(options.out, "The memory of each stage", sections)


if __name__ == "__main__":
    main()
