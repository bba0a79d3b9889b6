"""Loading JPEG files into shuffled uint8 batches, compared with the usual loaders.

python -m benchmarks.loader
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks import common
from stages.imaging.loader import CPU, load_batches
from stages.runtime.machine import usable_cores
from stages.training.epochs import split_into_batches

PACKAGES = ["torch", "torchvision", "pillow", "simplejpeg", "webdataset", "datasets", "pyarrow"]
BATCH = 128
# Enough that up to one worker per core get equal shares.
TARS = 4 * usable_cores()
# The largest mean difference between pixels from 0 to 255, since decoders round differently.
SAME_PIXELS = 1.0

# Each call is a pass over all images, in batches [n, 3, size, size].
Pass = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Case:
    loader: str
    workers: int
    cores: int

    def __str__(self) -> str:
        return f"{self.loader}, {self.workers} workers, {self.cores} cores"


def ours(folder: Path, _workers: int) -> Pass:
    """One thread per core; images stay uint8 in channels_last."""
    (bins,) = common.load_data(folder, "train")

    def batches() -> Iterator[Tensor]:
        order = np.random.default_rng().permutation(len(bins))
        rows = [order[positions] for positions in split_into_batches(len(bins), BATCH)]
        return (batch.images for batch in load_batches(bins, rows))

    return batches


def image_folder(folder: Path, workers: int) -> Pass:
    """torchvision's ImageFolder with Pillow, to uint8, so that it does no more work than ours."""
    return _from_folder(folder, workers, v2.PILToTensor())


def image_folder_float(folder: Path, workers: int) -> Pass:
    """The same with the usual transforms, which ours leaves to the device."""
    settings = common.model_params("resnet34")
    normalize = v2.Normalize(settings.mean, settings.std)
    to_float = v2.ToDtype(torch.float32, scale=True)
    return _from_folder(folder, workers, v2.Compose([v2.PILToTensor(), to_float, normalize]))


def _from_folder(folder: Path, workers: int, transform: Callable[[Any], Tensor]) -> Pass:
    images = ImageFolder(str(folder / "files"), transform)
    loader = DataLoader(
        images, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: (batch for batch, _ in loader)


def tar_files(folder: Path, workers: int) -> Pass:
    """webdataset with its own decoder. It can shuffle only its shards, and 1,000 images."""
    shards = sorted(str(path) for path in (folder / "tars").iterdir())
    images = (
        webdataset.WebDataset(shards, shardshuffle=len(shards))
        .shuffle(1000)
        .decode("torchrgb8")
        .to_tuple("jpg", "cls")
        .batched(BATCH)
    )
    loader = webdataset.WebLoader(
        images, batch_size=None, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: (batch for batch, _ in loader)


def hugging_face(folder: Path, workers: int) -> Pass:
    """Hugging Face datasets, on the unchanged Parquet shards."""
    datasets.disable_progress_bars()
    shards = sorted(str(path) for path in (folder / "resized").iterdir())
    rows = datasets.Dataset.from_parquet(shards, cache_dir=str(folder / "cache"))
    rows = rows.select_columns("image").cast_column("image", datasets.Image())
    loader: Any = DataLoader(
        rows.with_format("torch"),
        BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda: (batch["image"] for batch in loader)


OURS = "ours"
NORMALIZED = "torchvision ImageFolder, normalized to float32"
PEERS: Mapping[str, Callable[[Path, int], Pass]] = {
    "torchvision ImageFolder": image_folder,
    "webdataset": tar_files,
    "Hugging Face datasets": hugging_face,
}
LOADERS = {OURS: ours, **PEERS, NORMALIZED: image_folder_float}


def write_tars(folder: Path) -> None:
    """Write the files of folder/files in the form that webdataset expects."""
    paths = sorted(folder.glob("files/*/*.jpg"))
    (folder / "tars").mkdir()
    for number in range(TARS):
        with webdataset.TarWriter(str(folder / "tars" / f"{number:03d}.tar")) as tar:
            for path in paths[number::TARS]:
                label = int(path.parent.name)
                tar.write({"__key__": path.stem, "jpg": path.read_bytes(), "cls": label})


def limit_to(cores: int) -> None:
    """Limit this process, and those that it starts, to this many cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    # Batches are assembled faster without more threads, which stall on a busy machine.
    torch.set_num_threads(1)


def images_per_second(folder: Path, case: Case) -> float:
    """The speed of a second pass, since the first one starts the workers."""
    limit_to(case.cores)
    images = LOADERS[case.loader](folder, case.workers)
    expected = sum(len(batch) for batch in images())
    started = time.perf_counter()
    seen = sum(len(batch) for batch in images())
    seconds = time.perf_counter() - started
    if seen != expected:
        raise AssertionError(f"{case} gave {seen} images, but {expected} in the pass before")
    return seen / seconds


def difference(folder: Path, loader: str, workers: int) -> float:
    """The mean difference between the pixels of this loader and those of the bins themselves.

    Raises AssertionError if it is large, or if the loader does not give every image once.
    """
    (bins,) = common.load_data(folder, "train")
    rows = np.array_split(np.arange(len(bins)), -(-len(bins) // BATCH))
    truth = torch.cat([batch.images.clone() for batch in load_batches(bins, rows)])
    given = torch.cat([_as_uint8(batch) for batch in LOADERS[loader](folder, workers)()])
    # The images are shuffled, so match each with the one whose small copy is nearest.
    nearest = torch.cdist(_small(given), _small(truth)).argmin(1)
    if not nearest.sort().values.equal(torch.arange(len(truth))):
        raise AssertionError(f"{loader} did not give every image once")
    mean = (given.short() - truth[nearest].short()).abs().double().mean().item()
    if mean > SAME_PIXELS:
        raise AssertionError(f"{loader} gives other pixels: {mean:.1f} of 255 off")
    return mean


def _as_uint8(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images.clone()
    settings = common.model_params("resnet34")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.mean, settings.std))
    return ((images * std + mean) * 255).round().to(torch.uint8)


def _small(images: Tensor) -> Tensor:
    return adaptive_avg_pool2d(images.float(), 8).flatten(1)


def cases() -> list[Case]:
    """On one core and on all: ours, and each peer with 0, 1 and as many workers as cores.

    Normalizing is measured only with as many workers as cores, which suits it best.
    """
    found = []
    for cores in sorted({1, usable_cores()}):
        found.append(Case(OURS, 0, cores))
        found += [
            Case(loader, workers, cores) for loader in PEERS for workers in sorted({0, 1, cores})
        ]
        found.append(Case(NORMALIZED, cores, cores))
    return found


def speed_table(speeds: Mapping[Case, list[float]]) -> str:
    rows = []
    for case, values in speeds.items():
        own = statistics.median(speeds[Case(OURS, 0, case.cores)])
        rows.append(
            [
                str(case.cores),
                case.loader,
                "threads" if case.loader == OURS else str(case.workers),
                common.spread(values),
                common.times(own / statistics.median(values)),
            ]
        )
    return common.table(["cores", "loader", "workers", "images/s", "ours is"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("--images", type=int, default=1280, help="in one pass (default: 1280)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "loader-cpu.md")
    options = parser.parse_args()
    machine = common.describe_machine(CPU, PACKAGES)
    with common.synthetic_data(options.images, 0, options.size) as folder:
        write_tars(folder)
        same = {
            loader: common.in_fresh_process(difference, folder, loader, usable_cores())
            for loader in LOADERS
        }

        def measure(case: Case) -> float:
            return common.in_fresh_process(images_per_second, folder, case)

        speeds = common.interleaved(cases(), options.rounds, measure)
        size = common.mean_file_size(folder)
    scale = (
        f"{options.images} synthetic bins as JPEGs of {options.size} pixels, {size / 1000:.1f} kB"
        f" each, in the page cache, to shuffled batches of {BATCH}. A second pass over all images"
        f" is timed, in a new process for each measurement, limited to the cores in the table;"
        f" medians of {options.rounds} rounds, with the least and the most."
    )
    checked = [[loader, f"{value:.3f}"] for loader, value in same.items()]
    sections = {
        "": f"{machine}\n{scale}",
        "Images per second": speed_table(speeds),
        "The same images": "Each loader gave every image once. Its pixels differ by:\n\n"
        + common.table(["loader", "mean difference, of 255"], checked),
    }
    common.write_report(options.out, "Loading on a CPU", sections)


if __name__ == "__main__":
    main()
