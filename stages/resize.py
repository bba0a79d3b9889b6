"""Resize every photograph to a small square JPEG: data/resized; the undecodable are listed."""

from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import torch

from stages.core import jpeg, params
from stages.core.command import run_stage
from stages.core.files import digest, publish_folder, unfinished
from stages.core.parallel import usable_cores
from stages.core.shards import (
    IMAGES,
    Reject,
    RejectLimit,
    Row,
    Shard,
    build_shards,
    read_rejects,
    shard_paths,
    whole_parquet,
    write_rejects,
)

RAW = Path("data/raw")
UNFETCHED = Path("data/unfetched.csv")
OUT = Path("data/resized")
QUARANTINE = Path("data/quarantine.csv")


def main() -> str:
    knobs = params.load_params().resize
    limit = RejectLimit("resize.max_rejects", knobs.max_rejects)
    sources = [shard_of(path) for path in shard_paths(RAW)]
    # One thread an image: the pool below keeps every core busy.
    torch.set_num_threads(1)
    workers = usable_cores()
    identities = [_identity(path) for path in shard_paths(RAW)]
    key = digest(knobs.size, knobs.fit, knobs.quality, identities)
    with unfinished("resize", key) as folder:
        shards, undecodable = build_shards(
            folder,
            sources,
            partial(resize_bin, knobs),
            IMAGES,
            limit,
            workers=workers,
            window=16 * workers,
            unit=" photographs",
        )
        write_rejects(QUARANTINE, [*read_rejects(UNFETCHED), *undecodable])
        publish_folder(shards, OUT)
    total = sum(shard.rows for shard in sources)
    return f"{total - len(undecodable)} photographs; {len(undecodable)} undecodable ({QUARANTINE})"


def shard_of(path: Path) -> Shard[Row]:
    with whole_parquet(path):
        rows = pq.read_metadata(path).num_rows
    return Shard(path.name, rows, partial(load_shard, path))


def load_shard(path: Path) -> list[Row]:
    with whole_parquet(path):
        rows: list[Row] = pq.read_table(path).to_pylist()
    return rows


def resize_bin(knobs: params.Resize, row: Row) -> Row | Reject:
    """One photograph, resized, or the reason why it cannot be."""
    try:
        pixels = jpeg.decode(row["image"])
    except jpeg.ImageError as error:
        return Reject(row["id"], str(error))
    image = jpeg.encode(jpeg.resize(pixels, knobs.size, knobs.fit), knobs.quality)
    return {"id": row["id"], "quantity": row["quantity"], "image": image}


def _identity(path: Path) -> tuple[str, int, int]:
    """Enough to know a shard again in the next run, without reading gigabytes."""
    status = path.stat()
    return path.name, status.st_size, status.st_mtime_ns


if __name__ == "__main__":
    run_stage("resize", main)
