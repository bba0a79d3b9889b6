"""Photographs from the shards to batches of pixels, decoded by a pool of threads."""

import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.formats.shards import shard_paths, whole_parquet, write_table
from stages.formats.tables import read_csv
from stages.imaging import jpeg
from stages.runtime.errors import UserError
from stages.runtime.machine import usable_cores
from stages.runtime.work import scratch

CPU = torch.device("cpu")
# Batches decoded ahead of the one in use.
PREFETCH = 2
# The two files that pack_bins writes.
IMAGES = "images"
TABLE = "bins.parquet"


class Images:
    """JPEG files, one after another in a single file, and read on demand.

    The operating system caches them once for all processes of a machine. They are read, not mapped,
    because mapped pages would count as memory of each process.
    """

    def __init__(self, path: Path, offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        self._file = path.open("rb", buffering=0)
        self._offsets = offsets
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, row: int) -> bytes:
        # A loop over the images ends with this IndexError.
        if row >= len(self):
            raise IndexError(row)
        return os.pread(self._file.fileno(), int(self._lengths[row]), int(self._offsets[row]))


@dataclass(frozen=True)
class Bins:
    """The bins of one set, in the order of their ids, with their resized photographs as JPEG."""

    ids: list[str]
    quantities: NDArray[np.int64]
    images: Images
    size: int

    def __len__(self) -> int:
        return len(self.ids)


class Batch(NamedTuple):
    """`images`: uint8 [batch, 3, size, size] in channels_last; `rows`: their positions in Bins.

    On a CPU, the next batch overwrites the images.
    """

    images: Tensor
    rows: NDArray[np.int64]


def load_bins(
    resized: Path, split: Path, *set_names: str, size: int, stage: str = "bins"
) -> list[Bins]:
    """The bins that `split` (a CSV of id and set) puts in each set, for one process.

    Their photographs are packed in the scratch folder of `stage`. Raises what pack_bins raises.
    """
    with scratch(stage) as folder:
        pack_bins(resized, split, set_names, size, folder)
        # The packed file is removed, but stays readable as long as it is open.
        return [open_bins(folder, name, size) for name in set_names]


def pack_bins(
    resized: Path, split: Path, set_names: Sequence[str], size: int, folder: Path
) -> None:
    """Write the sets' photographs one after another into a file in `folder`, and a table of them.

    Where `split` has a column quantity, as with corrected counts, it replaces that of the shards.
    Raises UserError if a set is empty, a bin is missing from the shards, or the photographs are not
    `size` pixels wide and high.
    """
    sets = pa.Table.from_pandas(read_csv(split), preserve_index=False)
    sets = sets.filter(pc.is_in(sets["set"], pa.array(set_names)))
    for name in set_names:
        if name not in sets["set"].unique().to_pylist():
            raise UserError(f"{split} has no bin in the set {name}: check split.{name}")
    packed = []
    with (folder / IMAGES).open("wb") as file:
        for path in shard_paths(resized):
            with whole_parquet(path):
                shard = pq.read_table(path)
            _check_size(resized, shard, size)
            rows = pc.index_in(shard["id"], sets["id"])
            shard = shard.append_column("row", rows).filter(pc.is_valid(rows))
            for image in shard["image"]:
                file.write(image.as_buffer())
            shard = shard.append_column("length", pc.binary_length(shard["image"]))
            packed.append(shard.drop_columns("image"))
    bins = pa.concat_tables(packed)
    if len(bins) < len(sets):
        missing = pc.filter(sets["id"], pc.invert(pc.is_in(sets["id"], bins["id"])))[0]
        raise UserError(f"{resized} lacks {len(sets) - len(bins)} bins of {split}, like {missing}")
    bins = bins.append_column("set", sets["set"].take(bins["row"]))
    if "quantity" in sets.column_names:
        corrected = sets["quantity"].take(bins["row"]).cast(pa.int32())
        bins = bins.drop_columns("quantity").append_column("quantity", corrected)
    ends = pc.cumulative_sum(pc.cast(bins["length"], pa.int64()))
    bins = bins.append_column("offset", pc.subtract(ends, bins["length"]))
    write_table(folder / TABLE, bins.drop_columns("row"))


def _check_size(resized: Path, shard: pa.Table, size: int) -> None:
    """Check the shard's first photograph; the resize stage makes all of them alike."""
    for image in shard["image"][:1]:
        height, width, _ = jpeg.decode(image.as_py()).shape
        if (height, width) != (size, size):
            raise UserError(
                f"{resized} has photographs of {width} x {height} pixels, but resize.size is"
                f" {size}: make them again with `dvc repro --force resize`"
            )


def open_bins(folder: Path, set_name: str, size: int) -> Bins:
    """Open a set that pack_bins wrote to `folder`, of photographs of this size."""
    table = pq.read_table(folder / TABLE, filters=pc.field("set") == set_name)
    images = Images(folder / IMAGES, table["offset"].to_numpy(), table["length"].to_numpy())
    return Bins(
        ids=table["id"].to_pylist(),
        quantities=table["quantity"].to_numpy().astype(np.int64),
        images=images,
        size=size,
    )


def load_batches(
    bins: Bins,
    batches: Sequence[NDArray[np.int64]],
    device: torch.device = CPU,
    threads: int | None = None,
) -> Generator[Batch]:
    """The bins at the rows of each of `batches`, decoded ahead into a few reused buffers.

    Each core (or each of `threads`) decodes a piece of every batch, because the decoder releases
    the GIL. Empty batches stay empty. Close it if it may not be read to its end: the garbage
    collector would wait for its threads at any time, perhaps in one of them.
    """
    threads = threads or usable_cores()
    shape = (max(map(len, batches), default=0), bins.size, bins.size, 3)
    on_gpu = device.type == "cuda"
    buffers = [
        torch.empty(shape, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(PREFETCH + 1)
    ]
    copied: list[Any] = [torch.cuda.Event() for _ in buffers] if on_gpu else []  # type: ignore[no-untyped-call]
    decoding: deque[list[Future[None]]] = deque()
    pool = ThreadPoolExecutor(threads)

    def decode_ahead(number: int) -> None:
        rows = batches[number]
        if on_gpu:
            # Its previous content may still be on the way to the GPU.
            copied[number % len(buffers)].synchronize()
        pixels = buffers[number % len(buffers)].numpy()
        pieces = np.array_split(np.arange(len(rows)), threads)
        decoding.append([pool.submit(_decode_piece, bins, rows, pixels, p) for p in pieces])

    try:
        for number in range(min(PREFETCH, len(batches))):
            decode_ahead(number)
        for number, rows in enumerate(batches):
            if number + PREFETCH < len(batches):
                decode_ahead(number + PREFETCH)
            for job in decoding.popleft():
                job.result()
            pixels = buffers[number % len(buffers)][: len(rows)].permute(0, 3, 1, 2)
            images = pixels.to(device, non_blocking=True)
            if on_gpu:
                copied[number % len(buffers)].record()
            yield Batch(images, rows)
    finally:
        pool.shutdown(cancel_futures=True)


def _decode_piece(
    bins: Bins, rows: NDArray[np.int64], pixels: NDArray[np.uint8], positions: NDArray[np.int64]
) -> None:
    for position in positions:
        jpeg.decode_into(bins.images[int(rows[position])], pixels[position])
