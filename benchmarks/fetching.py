"""Fetching and resizing photographs, compared with the tools that one would use instead.

    python -m benchmarks.fetching

All read the same objects from the same server (benchmarks/true_bucket.py), one after another. The
peers are s5cmd, boto3 in threads, and img2dataset, which has its own virtual environment.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from ruamel.yaml import YAML

from benchmarks import common
from benchmarks.measured import Measure
from benchmarks.true_bucket import BUCKET, serving_true_bucket
from stages.collecting.bucket import open_bucket
from stages.collecting.listing import list_objects
from stages.formats.shards import write_table
from stages.imaging.loader import CPU
from stages.runtime import params

PACKAGES = ["obstore", "boto3", "s5cmd", "uvloop", "simplejpeg", "torch"]
IMG2DATASET = common.ROOT / ".venv-img2dataset"
SHARD_BINS = 1000
OURS = "`stages.fetch`: checked by MD5, into Parquet shards"
S5CMD = "s5cmd, 256 workers, one file each"
BOTO3 = "boto3, 64 threads, one file each"
BOTH = "`stages.fetch`, then `stages.resize`"
PEER = "img2dataset, 2 processes, 256 threads"
BOTO3_PROGRAM = """\
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import boto3
from botocore import UNSIGNED
from botocore.config import Config
url, bucket, keys, out = sys.argv[1:]
config = Config(signature_version=UNSIGNED, max_pool_connections=64)
client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", config=config)
def read(key):
    body = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    Path(out, key.rpartition("/")[2]).write_bytes(body)
with ThreadPoolExecutor(64) as pool:
    list(pool.map(read, Path(keys).read_text().split()))
"""


class Case(NamedTuple):
    """A way to fetch, or to fetch and resize: commands that run one after another."""

    name: str
    commands: Sequence[Sequence[str]]


class Taken(NamedTuple):
    seconds: float
    cpu_seconds: float


def prepare(folder: Path, url: str, photographs: int) -> list[str]:
    """Write the inputs of the stages and the lists for the peers. Returns the photographs' keys."""
    bucket = params.Bucket(url=f"s3://{BUCKET}", region="us-east-1", endpoint=url, anonymous=True)
    listed = list_objects(open_bucket(bucket), "bin-images/").drop_columns("stamp")
    step = max(1, len(listed) // photographs)
    sampled = listed.take(pa.array(range(0, len(listed), step))).slice(0, photographs)
    keys: list[str] = sampled["key"].to_pylist()
    ids = pa.array([Path(key).stem for key in keys])
    quantity = pa.array([1] * len(keys), pa.int32())
    write_table(
        folder / "data/subset.parquet",
        pa.table({"id": ids, "quantity": quantity, "group": ids})
        .append_column("key", sampled["key"])
        .append_column("size", sampled["size"])
        .append_column("etag", sampled["etag"]),
    )
    values = common.load_params()
    values["bucket"]["endpoint"] = url
    # As in img2dataset.
    values["resize"]["fit"] = "pad"
    YAML(typ="safe", pure=True).dump(values, folder / "params.yaml")
    (folder / "keys.txt").write_text("\n".join(keys))
    (folder / "urls.txt").write_text("\n".join(f"{url}/{BUCKET}/{key}" for key in keys))
    copies = [f"cp s3://{BUCKET}/{key} files/{Path(key).name}" for key in keys]
    (folder / "copies.txt").write_text("\n".join(copies))
    return keys


def cases(url: str, python: str) -> list[list[Case]]:
    """The cases of fetching, and those of fetching and resizing."""
    fetch = [sys.executable, "-m", "stages.fetch"]
    resize = [sys.executable, "-m", "stages.resize"]
    s5cmd = [str(Path(sys.executable).with_name("s5cmd")), "--no-sign-request"]
    s5cmd += ["--endpoint-url", url, "--log", "error", "run", "copies.txt"]
    boto3 = [sys.executable, "-c", BOTO3_PROGRAM, url, BUCKET, "keys.txt", "files"]
    img2dataset = [python, "-c", "from img2dataset.main import main; main()", "--url_list=urls.txt"]
    img2dataset += ["--output_folder=peer", "--output_format=parquet", "--image_size=224"]
    img2dataset += ["--resize_mode=border", "--encode_quality=90", "--processes_count=2"]
    img2dataset += ["--thread_count=256", f"--number_sample_per_shard={SHARD_BINS}"]
    return [
        [Case(OURS, [fetch]), Case(S5CMD, [s5cmd]), Case(BOTO3, [boto3])],
        [Case(BOTH, [fetch, resize]), Case(PEER, [img2dataset])],
    ]


def measure(case: Case, folder: Path, expected: int) -> Taken:
    """Run a case in an empty folder. Raises RuntimeError if photographs are missing."""
    for leftover in ("data/raw", "data/resized", "files", "peer", ".cache"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    (folder / "files").mkdir()
    environment = os.environ | {"PYTHONPATH": str(common.ROOT), "NO_ALBUMENTATIONS_UPDATE": "1"}
    taken = [Measure.of(command, folder, environment) for command in case.commands]
    found = count_photographs(folder)
    if found != expected:
        raise RuntimeError(f"{case.name} wrote {found} of {expected} photographs")
    return Taken(
        sum(one.seconds for one in taken),
        sum(one.cpu_seconds for one in taken),
    )


def count_photographs(folder: Path) -> int:
    """How many photographs a case has written, as files or in shards."""
    if files := list((folder / "files").iterdir()):
        return len(files)
    shards = list((folder / "peer").glob("*.parquet"))
    name = "jpg" if shards else "image"
    shards = shards or list((folder / "data/raw").iterdir())
    columns = [pq.read_table(shard, columns=[name])[name] for shard in shards]
    return sum(len(column) - column.null_count for column in columns)


def rows(taken: Mapping[str, Sequence[Taken]], photographs: int) -> list[list[str]]:
    """A row for each case; ours comes first, and the others are compared with it."""
    medians = {name: statistics.median(one.seconds for one in some) for name, some in taken.items()}
    cpu = {name: statistics.median(one.cpu_seconds for one in some) for name, some in taken.items()}
    ours = next(iter(taken))
    return [
        [
            name,
            common.spread([photographs / one.seconds for one in some]),
            common.times(medians[name] / medians[ours]),
            common.rounded(1000 * cpu[name] / photographs),
            common.times(cpu[name] / cpu[ours]),
        ]
        for name, some in taken.items()
    ]


def compare(some: Sequence[Case], folder: Path, photographs: int, rounds: int) -> str:
    """Measure these cases in turns. Returns a table."""
    taken: dict[str, list[Taken]] = {case.name: [] for case in some}
    for number in range(1, rounds + 1):
        for case in some if number % 2 else reversed(some):
            taken[case.name].append(measure(case, folder, photographs))
            print(f"round {number}/{rounds}: {case.name}: {taken[case.name][-1]}", flush=True)
    header = ["", "photographs/s", "takes", "CPU ms each", "CPU"]
    return common.table(header, rows(taken, photographs))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fetching",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--photographs", type=int, default=20_000, help="default: 20000")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument(
        "--latency-ms", type=float, nargs="+", default=[0, 30], help="default: 0 30"
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS / "fetching.md")
    options = parser.parse_args()
    sections = {"": common.describe_machine(CPU, PACKAGES)}
    python = str(IMG2DATASET / "bin/python")
    for latency in options.latency_ms:
        with (
            TemporaryDirectory(prefix="bench-") as name,
            serving_true_bucket(2 * options.photographs, latency) as url,
        ):
            folder = Path(name)
            prepare(folder, url, options.photographs)
            fetching, resizing = cases(url, python)
            server = f"a server that answers after {latency:g} ms"
            sections[f"Fetching from {server}"] = compare(
                fetching, folder, options.photographs, options.rounds
            )
            sections[f"Fetching and resizing to 224 pixels, from {server}"] = compare(
                resizing, folder, options.photographs, options.rounds
            )
    sections[""] += (
        f"\n{options.photographs:,} photographs of 57 kB on average, the same for all, from one"
        " server that shares the cores and whose CPU time is not counted. Each is a process as a"
        f" user starts it. Medians of {options.rounds} rounds, with the least and the most; 'takes'"
        f" and 'CPU' are multiples of ours. The load average was {os.getloadavg()[0]:.2f} at the"
        " end."
    )
    common.write_report(options.out, "Fetching and resizing", sections)


if __name__ == "__main__":
    main()
