"""Resize every photograph to a small square JPEG in data/resized; list those that fail."""

import asyncio
from collections.abc import Callable, Sequence
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
from stages.runtime.work import publish_folder, resumable
from stages.sharding.building import (
    BuiltShard,
    RejectLimit,
    Shard,
    build_shards,
    built_shard,
    missing_shards,
)
from stages.sharding.executors import executor

NEEDED_FOR = "the resized photographs"
# How many photographs are resized to estimate the space for all.
SAMPLE = 32


def main() -> str:
    params = load_params()
    limit = RejectLimit("resize.max_rejects", params.resize.max_rejects)
    sources = [plan_shard(path) for path in shard_paths(paths.RAW)]
    identities = [_identity(path) for path in shard_paths(paths.RAW)]
    key = digest(params.resize.size, params.resize.fit, params.resize.quality, identities)
    with resumable("resize", key) as folder:
        require_space(
            folder, bytes_to_write(params.resize, missing_shards(folder, sources)), NEEDED_FOR
        )
        if not on_one_disk(folder, paths.RESIZED.parent):
            require_space(paths.RESIZED.parent, bytes_to_write(params.resize, sources), NEEDED_FOR)
        shards, undecodable, _ = build_shards(
            partial(resize_shard, params.resize),
            folder,
            sources,
            limit,
            unit=" photographs",
            executor=executor(params.run.executor, usable_cores()),
        )
        write_rejects(paths.QUARANTINE, [*read_rejects(paths.UNFETCHED), *undecodable])
        publish_folder(shards, paths.RESIZED)
    total = sum(shard.rows for shard in sources)
    left_out = f"{len(undecodable)} undecodable ({paths.QUARANTINE})"
    return f"{total - len(undecodable)} photographs; {left_out}"


def plan_shard(path: Path) -> Shard:
    """The shard of data/resized that a shard of data/raw becomes."""
    with whole_parquet(path):
        rows = pq.read_metadata(path).num_rows
    # Absolute, because machines of a cluster share the disk, but not the current directory.
    return Shard(path.name, rows, path.absolute())


def bytes_to_write(params: Resize, shards: Sequence[Shard]) -> int:
    """An estimate of the space for these shards, from some photographs of the first."""
    some = [resize_bin(params, row) for shard in shards[:1] for row in read_rows(shard)[:SAMPLE]]
    sizes = [len(result["image"]) for result in some if not isinstance(result, Reject)]
    return sum(sizes) * sum(shard.rows for shard in shards) // max(1, len(sizes))


def read_rows(shard: Shard) -> list[Row]:
    with whole_parquet(shard.source):
        rows: list[Row] = pq.read_table(shard.source).to_pylist()
    return rows


async def resize_shard(
    params: Resize, shard: Shard, advance: Callable[[int], object]
) -> BuiltShard:
    """Resize a shard's photographs in a thread of its own; each core works on one shard."""
    loop = asyncio.get_running_loop()
    advance_here = partial(loop.call_soon_threadsafe, advance, 1)
    return await asyncio.to_thread(_resize_all, params, shard, advance_here)


def _resize_all(params: Resize, shard: Shard, advance: Callable[[], object]) -> BuiltShard:
    # Each core works on a shard of its own.
    torch.set_num_threads(1)
    results = []
    for row in read_rows(shard):
        results.append(resize_bin(params, row))
        advance()
    return built_shard(results, IMAGES)


def resize_bin(params: Resize, row: Row) -> Row | Reject:
    """Resize one photograph, or say why it cannot be resized."""
    try:
        pixels = jpeg.decode(row["image"])
    except jpeg.ImageError as error:
        return Reject(row["id"], str(error))
    image = jpeg.encode(jpeg.resize(pixels, params.size, params.fit), params.quality)
    return {"id": row["id"], "quantity": row["quantity"], "image": image}


def _identity(path: Path) -> tuple[str, int, int]:
    """Enough to recognize a shard in the next run without reading gigabytes."""
    status = path.stat()
    return path.name, status.st_size, status.st_mtime_ns


if __name__ == "__main__":
    run_stage("resize", main)
