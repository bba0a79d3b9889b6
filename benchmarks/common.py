"""What the benchmarks share: synthetic data, rounds, the machine's description, tables.

Imports neither obstore nor DVC, which a GPU machine may lack.
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
from stages.runtime.params import ModelParams
from tools.synthetic import SyntheticBin, synthetic_bins

T = TypeVar("T")
P = ParamSpec("P")

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Standard deviation of the noise on the synthetic bins: with it their JPEGs of 224 pixels are as
# large as those of real photographs, 11 kB, and take as long to decode.
GRAIN = 3.7
# Taken over by fresh processes. None of them may use a GPU when imported: no copy could then.
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
    """The values of params.yaml, to be changed and written."""
    values: dict[str, Any] = parse_yaml((ROOT / "params.yaml").read_text("utf-8"))
    return values


def model_params(model: str, **changes: Any) -> ModelParams:
    """The train block of that model in params.yaml, with some of its settings changed."""
    return changed(params.load_params(ROOT / "params.yaml").model(model), **changes)


def changed(settings: ModelParams, **changes: Any) -> ModelParams:
    """A copy with other values. Raises AttributeError for an unknown knob."""
    for name in changes:
        getattr(settings, name)
    return settings.model_copy(update=changes)


def fresh_processes(count: int = 1) -> ProcessPoolExecutor:
    """New processes, begun with the libraries imported but nothing computed yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in SLOW_IMPORTS if name in sys.modules])
    return ProcessPoolExecutor(count, context, _fork_from_here)


def _fork_from_here() -> None:
    """Workers of a DataLoader start as they do in a process of one's own."""
    multiprocessing.set_start_method("fork", force=True)


def in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    with fresh_processes() as pool:
        return pool.submit(function, *args, **kwargs).result()


@contextmanager
def synthetic_data(train: int, test: int, size: int) -> Iterator[Path]:
    """A folder with synthetic bins of `size` pixels, gone when the block ends.

    resized/ and split.csv are as the pipeline makes them; files/<quantity>/<id>.jpg are those of
    the training set once more, as most loaders want them.
    """
    with TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        rows = _draw_rows(train + test, size)
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


def _draw_rows(count: int, size: int) -> list[Row]:
    values = load_params()
    draw = partial(_synthesize, size, values["resize"]["quality"], values["subset"]["quantities"])
    seeds = range(-(-count // BINS_AT_ONCE))
    with fresh_processes(usable_cores()) as pool:
        rows = list(chain.from_iterable(pool.map(draw, seeds)))[:count]
    return [row | {"id": f"{number:06d}"} for number, row in enumerate(rows, start=1)]


def _synthesize(size: int, quality: int, quantities: Sequence[int], seed: int) -> list[Row]:
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
    """Of a JPEG of the training set, in bytes."""
    return statistics.mean(path.stat().st_size for path in folder.glob("files/*/*.jpg"))


def load_data(folder: Path, *sets: str) -> list[Bins]:
    """These sets of synthetic_data, or of the pipeline's data folder."""
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
    """The first `count` bins, beginning again where they end."""
    rows = np.arange(count) % len(bins)
    ids = [bins.ids[row] for row in rows]
    images = _RepeatedImages(bins.images, count)
    return replace(bins, ids=ids, quantities=bins.quantities[rows], images=images)


def interleaved(
    cases: Iterable[T], rounds: int, measure: Callable[[T], float]
) -> dict[T, list[float]]:
    """Measure each case once a round, so that a machine whose speed swings treats all alike.

    The order is another one in each round.
    """
    values: dict[T, list[float]] = {case: [] for case in cases}
    for number in range(1, rounds + 1):
        for case in random.Random(number).sample(list(values), len(values)):
            values[case].append(measure(case))
            print(f"round {number}/{rounds}: {case}: {values[case][-1]:.4g}", flush=True)
    return values


def spread(values: Sequence[float]) -> str:
    """The median, and between which values it is."""
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
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def describe_machine(device: torch.device, packages: Sequence[str]) -> str:
    """The hardware, and the versions of what is measured, as a table."""
    rows = {"processor": f"{_processor()}, {usable_cores()} cores to use"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        rows["GPU"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    rows["precision of ours"] = "bfloat16" if computes_in_bfloat16(device) else "float32, no bf16"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    rows["versions"] = ", ".join([f"Python {platform.python_version()}", *versions])
    rows["load average before"] = f"{os.getloadavg()[0]:.2f}"
    return table(["machine", ""], rows.items())


def computes_in_bfloat16(device: torch.device) -> bool:
    with autocast(device):
        return torch.is_autocast_enabled(device.type)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    names = (
        re.findall(r"model name\s*: (.*)", information.read_text()) if information.exists() else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def own_command() -> str:
    """How this process was started."""
    module = sys.modules["__main__"].__spec__
    return shlex.join(["python", "-m", module.name if module else "", *sys.argv[1:]])


def write_report(path: Path, title: str, sections: Mapping[str, str]) -> None:
    """The texts under their headings, and the command that made them."""
    parts = [f"# {title}", f"Made by `{own_command()}`."]
    for heading, text in sections.items():
        parts += [f"## {heading}" if heading else "", text.strip()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part for part in parts if part) + "\n", "utf-8")
