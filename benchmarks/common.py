"""Shared by the benchmarks: synthetic data, rounds, descriptions of the machine, tables.

This module imports neither obstore nor DVC, which a GPU machine may lack.
"""

import importlib.metadata
import multiprocessing
import os
import platform
import random
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ParamSpec, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ruamel.yaml import YAML

from stages.formats.shards import IMAGES, Row, shard_name, shard_paths, write_table
from stages.formats.tables import write_csv
from stages.imaging import jpeg
from stages.imaging.loader import Bins, Images, open_bins, pack_bins
from stages.networks.inference import autocast
from stages.runtime import params
from stages.runtime.machine import usable_cores
from stages.runtime.params import ModelParams, Precision
from tools.synthetic import SyntheticBin, synthetic_bins

T = TypeVar("T")
P = ParamSpec("P")

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# The standard deviation of the noise on synthetic bins. It makes their JPEGs of 224 pixels as large
# as those of real photographs (11 kB), and as slow to decode.
GRAIN = 3.7
# Fresh processes inherit these modules. None may use a GPU on import: forks could not use it then.
SLOW_IMPORTS = [
    "stages.training.engine",
    "benchmarks.training",
    "torchvision.transforms.v2",
    "datasets",
    "webdataset",
]
BINS_AT_ONCE = 32
BINS_IN_A_SHARD = 256


def parse_yaml(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def load_params() -> dict[str, Any]:
    """The values of params.yaml, for changing and writing them."""
    values: dict[str, Any] = parse_yaml((ROOT / "params.yaml").read_text("utf-8"))
    return values


def model_params(model: str, **changes: Any) -> ModelParams:
    """The model's params in params.yaml, with some of them changed."""
    return changed(params.load_params(ROOT / "params.yaml").model(model), **changes)


def changed(settings: ModelParams, **changes: Any) -> ModelParams:
    """A copy with other values. Raises AttributeError for an unknown knob."""
    for name in changes:
        getattr(settings, name)
    return settings.model_copy(update=changes)


def fresh_processes(count: int = 1) -> ProcessPoolExecutor:
    """New processes, in which the libraries are imported but nothing is computed yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in SLOW_IMPORTS if name in sys.modules])
    return ProcessPoolExecutor(count, context, _fork_from_here)


def _fork_from_here() -> None:
    """Let the workers of a DataLoader start as in an ordinary process."""
    multiprocessing.set_start_method("fork", force=True)


def in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    with fresh_processes() as pool:
        return pool.submit(function, *args, **kwargs).result()


@contextmanager
def synthetic_data(train: int, test: int, size: int) -> Iterator[Path]:
    """A folder with synthetic bins of `size` pixels, which is removed when the block ends.

    resized/ and split.csv are as the pipeline writes them. files/<quantity>/<id>.jpg are copies of
    the training set, in the layout that most loaders expect.
    """
    with TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        rows = _render_rows(train + test, size)
        for number, start in enumerate(range(0, len(rows), BINS_IN_A_SHARD)):
            table = pa.Table.from_pylist(rows[start : start + BINS_IN_A_SHARD], IMAGES)
            write_table(folder / "resized" / shard_name(number), table)
        sets = ["train"] * train + ["test"] * test
        ids = [row["id"] for row in rows]
        write_csv(folder / "split.csv", pd.DataFrame({"id": ids, "set": sets}))
        for row in rows[:train]:
            path = folder / "files" / str(row["quantity"]) / f"{row['id']}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(row["image"])
        yield folder


def _render_rows(count: int, size: int) -> list[Row]:
    values = load_params()
    render = partial(_render, size, values["resize"]["quality"], values["subset"]["quantities"])
    seeds = range(-(-count // BINS_AT_ONCE))
    with fresh_processes(usable_cores()) as pool:
        rows = list(chain.from_iterable(pool.map(render, seeds)))[:count]
    return [row | {"id": f"{number:06d}"} for number, row in enumerate(rows, start=1)]


def _render(size: int, quality: int, quantities: Sequence[int], seed: int) -> list[Row]:
    torch.set_num_threads(1)
    noise = np.random.default_rng(seed)
    bins = (
        synthetic for synthetic in synthetic_bins(10_000, seed) if synthetic.quantity in quantities
    )
    return [_row(synthetic, size, quality, noise) for synthetic in islice(bins, BINS_AT_ONCE)]


def _row(synthetic: SyntheticBin, size: int, quality: int, noise: np.random.Generator) -> Row:
    pixels = jpeg.resize(jpeg.decode(synthetic.photograph), size, "squeeze")
    grainy = (pixels + noise.normal(0, GRAIN, pixels.shape)).clip(0, 255).astype(np.uint8)
    return {"quantity": synthetic.quantity, "image": jpeg.encode(grainy, quality)}


def mean_file_size(folder: Path) -> float:
    """The mean size of the training set's JPEGs, in bytes."""
    return statistics.mean(path.stat().st_size for path in folder.glob("files/*/*.jpg"))


def load_data(folder: Path, *sets: str) -> list[Bins]:
    """The bins of these sets, in a folder of synthetic_data or in the pipeline's data folder."""
    first = pq.read_table(shard_paths(folder / "resized")[0])["image"][0].as_py()
    size = jpeg.decode(first).shape[0]
    with TemporaryDirectory(prefix="bench-") as work:
        pack_bins(folder / "resized", folder / "split.csv", sets, size, Path(work))
        return [open_bins(Path(work), name, size) for name in sets]


class _RepeatedImages(Images):
    def __init__(self, images: Images, count: int) -> None:
        self._images = images
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> bytes:
        return self._images[row % len(self._images)]


def repeated(bins: Bins, count: int) -> Bins:
    """`count` bins: these bins again and again."""
    rows = np.arange(count) % len(bins)
    ids = [bins.ids[row] for row in rows]
    images = _RepeatedImages(bins.images, count)
    return replace(bins, ids=ids, quantities=bins.quantities[rows], images=images)


def interleaved(
    cases: Iterable[T], rounds: int, measure: Callable[[T], float]
) -> dict[T, list[float]]:
    """Measure each case once per round, so that changes of the machine's speed affect all alike.

    Each round has a different order.
    """
    values: dict[T, list[float]] = {case: [] for case in cases}
    for number in range(1, rounds + 1):
        for case in random.Random(number).sample(list(values), len(values)):
            values[case].append(measure(case))
            print(f"round {number}/{rounds}: {case}: {values[case][-1]:.4g}", flush=True)
    return values


def spread(values: Sequence[float]) -> str:
    """The median, and the least and the greatest value."""
    if len(values) == 1:
        return rounded(values[0])
    low, high = min(values), max(values)
    return f"{rounded(statistics.median(values))} ({rounded(low)}-{rounded(high)})"


def rounded(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,.10g}"


def times(value: float) -> str:
    return f"{value:.2f}x"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def describe_machine(device: torch.device, packages: Sequence[str]) -> str:
    """A table of the hardware, and of the versions of the packages that are measured."""
    rows = {"processor": f"{_processor()}, {usable_cores()} usable cores"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        rows["GPU"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    rows["precision of ours"] = "bfloat16" if computes_in_bfloat16(device) else "float32, no bf16"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    rows["versions"] = ", ".join([f"Python {platform.python_version()}", *versions])
    rows["load average before"] = f"{os.getloadavg()[0]:.2f}"
    return table(["machine", ""], rows.items())


def computes_in_bfloat16(device: torch.device, precision: Precision = "auto") -> bool:
    with autocast(device, precision):
        return torch.is_autocast_enabled(device.type)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    names = (
        re.findall(r"model name\s*: (.*)", information.read_text()) if information.exists() else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def own_command() -> str:
    """The command that started this process."""
    module = sys.modules["__main__"].__spec__
    return shlex.join(["python", "-m", module.name if module else "", *sys.argv[1:]])


def write_report(path: Path, title: str, sections: Mapping[str, str]) -> None:
    """Write the texts under their headings, and the command that produced them."""
    parts = [f"# {title}", f"Made by `{own_command()}`."]
    for heading, text in sections.items():
        parts += [f"## {heading}" if heading else "", text.strip()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part for part in parts if part) + "\n", "utf-8")
