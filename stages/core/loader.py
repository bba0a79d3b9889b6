"""Photographs from the shards to batches of pixels, decoded by a pool of threads."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.core import jpeg
from stages.core.command import UserError
from stages.core.files import read_csv
from stages.core.parallel import usable_cores
from stages.core.shards import shard_paths

# Batches decoded ahead of the one in use.
PREFETCH = 2


@dataclass(frozen=True)
class Bins:
    """The bins of one set, in the order of their ids, with their resized photographs as JPEG."""

    ids: list[str]
    quantities: NDArray[np.int64]
    images: pa.ChunkedArray
    size: int

    def __len__(self) -> int:
        return len(self.ids)


class Batch(NamedTuple):
    """`images`: uint8 [batch, 3, size, size] in channels_last; `rows`: their places in the Bins.

    The images are overwritten when the next batch is taken.
    """

    images: Tensor
    rows: NDArray[np.int64]


def load_bins(resized: Path, split: Path, set_name: str) -> Bins:
    """The bins that `split` (a CSV of id and set) puts in the set. Raises UserError if none."""
    sets = read_csv(split)
    ids = pa.array(sets.loc[sets["set"] == set_name, "id"], pa.string())
    if not len(ids):
        raise UserError(f"{split} has no bin in the set {set_name}: check split.{set_name}")
    tables = []
    for path in shard_paths(resized):
        table = pq.read_table(path)
        tables.append(table.filter(pc.is_in(table["id"], ids)))
    bins = pa.concat_tables(tables)
    if len(bins) < len(ids):
        missing = pc.filter(ids, pc.invert(pc.is_in(ids, bins["id"])))[0]
        raise UserError(f"{resized} lacks {len(ids) - len(bins)} bins of {split}, like {missing}")
    return Bins(
        ids=bins["id"].to_pylist(),
        quantities=bins["quantity"].to_numpy().astype(np.int64),
        images=bins["image"],
        size=jpeg.decode(bins["image"][0].as_py()).shape[0],
    )


def load_batches(bins: Bins, order: NDArray[np.int64], batch_size: int) -> Iterator[Batch]:
    """The bins at the places of `order`, decoded ahead into a few reused buffers.

    Every core decodes a piece of each batch; the decoder releases Python's lock.
    """
    threads = usable_cores()
    shape = (min(batch_size, len(order)), bins.size, bins.size, 3)
    buffers = [np.empty(shape, np.uint8) for _ in range(PREFETCH + 1)]
    decoding: deque[tuple[NDArray[np.uint8], NDArray[np.int64], list[Future[None]]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for start in range(0, len(order) + PREFETCH * batch_size, batch_size):
            rows = order[start : start + batch_size]
            if len(rows):
                pixels = buffers[start // batch_size % len(buffers)][: len(rows)]
                pieces = np.array_split(np.arange(len(rows)), threads)
                jobs = [pool.submit(_decode_piece, bins, rows, pixels, p) for p in pieces]
                decoding.append((pixels, rows, jobs))
            if start >= PREFETCH * batch_size and decoding:
                pixels, rows, jobs = decoding.popleft()
                for job in jobs:
                    job.result()
                yield Batch(torch.from_numpy(pixels).permute(0, 3, 1, 2), rows)
    finally:
        pool.shutdown(cancel_futures=True)


def _decode_piece(
    bins: Bins, rows: NDArray[np.int64], pixels: NDArray[np.uint8], places: NDArray[np.int64]
) -> None:
    for place in places:
        image = memoryview(bins.images[int(rows[place])].as_buffer()).cast("B")
        jpeg.decode_into(image, pixels[place])
