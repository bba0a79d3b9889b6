"""Resize every photograph to a small square JPEG: data/resized; the undecodable are listed."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import torch

from stages.formats.shards import (
    IMAGES,
    Reject,
    Row,
    read_rejects,
    shard_paths,
    whole_parquet,
    write_rejects,
)
from stages.imaging import jpeg
from stages.runtime import paths
from stages.runtime.command import run_stage
from stages.runtime.files import digest
from stages.runtime.machine import usable_cores
from stages.runtime.params import Resize, load_params
from stages.runtime.space import on_one_disk, require_space
from stages.runtime.work import publish_folder, unfinished
from stages.sharding.building import RejectLimit, Shard, ShardMaker, build_shards, missing_shards
from stages.sharding.executors import executor
from stages.sharding.parallel import map_in_order

WHAT = "the resized photographs"
# Photographs that tell how large the resized ones become.
SAMPLE = 32


def main() -> str:
    params = load_params()
    knobs = params.resize
    limit = RejectLimit("resize.max_rejects", knobs.max_rejects)
    sources = [shard_of(path) for path in shard_paths(paths.RAW)]
    # One thread an image: the pool below keeps every core busy.
    torch.set_num_threads(1)
    workers = usable_cores()
    identities = [_identity(path) for path in shard_paths(paths.RAW)]
    key = digest(knobs.size, knobs.fit, knobs.quality, identities)
    work = partial(map_in_order, partial(resize_bin, knobs))
    with unfinished("resize", key) as folder:
        require_space(folder, bytes_to_write(knobs, missing_shards(folder, sources)), WHAT)
        if not on_one_disk(folder, paths.RESIZED.parent):
            require_space(paths.RESIZED.parent, bytes_to_write(knobs, sources), WHAT)
        shards, undecodable = build_shards(
            ShardMaker(folder, work, IMAGES, workers, 16 * workers),
            sources,
            limit,
            unit=" photographs",
            executor=executor(params.run.executor),
        )
        write_rejects(paths.QUARANTINE, [*read_rejects(paths.UNFETCHED), *undecodable])
        publish_folder(shards, paths.RESIZED)
    total = sum(shard.rows for shard in sources)
    left_out = f"{len(undecodable)} undecodable ({paths.QUARANTINE})"
    return f"{total - len(undecodable)} photographs; {left_out}"


def bytes_to_write(knobs: Resize, shards: Sequence[Shard[Row]]) -> int:
    """About what the shards will take, to judge by some photographs of the first."""
    some = [resize_bin(knobs, row) for shard in shards[:1] for row in shard.load()[:SAMPLE]]
    sizes = [len(result["image"]) for result in some if not isinstance(result, Reject)]
    return sum(sizes) * sum(shard.rows for shard in shards) // max(1, len(sizes))


def shard_of(path: Path) -> Shard[Row]:
    with whole_parquet(path):
        rows = pq.read_metadata(path).num_rows
    # Absolute, for machines that share the disk but not the current directory.
    return Shard(path.name, rows, partial(load_shard, path.absolute()))


def load_shard(path: Path) -> list[Row]:
    with whole_parquet(path):
        rows: list[Row] = pq.read_table(path).to_pylist()
    return rows


def resize_bin(knobs: Resize, row: Row) -> Row | Reject:
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
