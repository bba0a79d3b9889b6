"""Download the sampled bins' photographs, byte for byte, to the Parquet shards of data/raw."""

from collections.abc import Callable, Sequence
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from obstore.store import LocalStore

from stages.collecting.advice import explained
from stages.collecting.bucket import PHOTOGRAPHS, Store, open_bucket
from stages.collecting.failures import ObjectError
from stages.collecting.listing import list_objects
from stages.collecting.reading import Reader, summary
from stages.formats.shards import IMAGES, Reject, Row, table_digest, whole_parquet, write_rejects
from stages.runtime import paths
from stages.runtime.command import run_stage
from stages.runtime.files import digest, sha256_file
from stages.runtime.params import load_params
from stages.runtime.space import on_one_disk, readable, require_space
from stages.runtime.work import publish_folder, resumable
from stages.sharding.building import (
    BuiltShard,
    RejectLimit,
    Shard,
    build_shards,
    built_shard,
    each_row,
    first_finished_row,
    missing_shards,
    plan_shards,
)
from stages.sharding.executors import executor

NEEDED_FOR = "the photographs to fetch"
# So that others are read while one is written.
SHARDS_AT_ONCE = 3
# Real ones have up to 260 kB; those of good cameras, 10 MB.
MAX_PHOTOGRAPH_BYTES = 16 * 1024 * 1024


def main() -> str:
    params = load_params()
    limit = RejectLimit("fetch.max_rejects", params.fetch.max_rejects)
    with whole_parquet(paths.SUBSET):
        subset = pq.read_table(paths.SUBSET)
    with explained(params.bucket):
        store = open_bucket(params.bucket)
        state = folder_state(store, subset)
        key = digest(params.bucket, params.fetch.shard_bins, sha256_file(paths.SUBSET), state)
        with resumable("fetch", key) as folder:
            planned = plan_shards(subset, params.fetch.shard_bins, "size")
            require_space(folder, bytes_to_fetch(missing_shards(folder, planned)), NEEDED_FOR)
            if not on_one_disk(folder, paths.RAW.parent):
                require_space(paths.RAW.parent, bytes_to_fetch(planned), NEEDED_FOR)
            before = first_finished_row(folder, planned)
            reader = Reader(store, witness=before["key"] if before else None)
            shards, rejects, retried = build_shards(
                partial(fetch_shard, reader),
                folder,
                planned,
                limit,
                unit=" photographs",
                executor=executor(params.run.executor, SHARDS_AT_ONCE),
            )
            write_rejects(paths.UNFETCHED, rejects)
            publish_folder(shards, paths.RAW)
    missing = f"{len(rejects)} could not be fetched ({paths.UNFETCHED})"
    return f"{len(subset) - len(rejects)} photographs; {missing}{summary(retried)}"


def folder_state(store: Store, subset: pa.Table) -> str | None:
    """A digest that changes with any sampled photograph of a folder; S3 has etags instead."""
    if not isinstance(store, LocalStore):
        return None
    listing = list_objects(store, PHOTOGRAPHS)
    return table_digest(listing.filter(pc.is_in(listing["key"], subset["key"].combine_chunks())))


def bytes_to_fetch(shards: Sequence[Shard]) -> int:
    """How much space the photographs of these shards take."""
    sizes = (size for shard in shards for size in shard.source["size"].to_pylist())
    return sum(size for size in sizes if size <= MAX_PHOTOGRAPH_BYTES)


async def fetch_shard(reader: Reader, shard: Shard, advance: Callable[[int], object]) -> BuiltShard:
    """Read the photographs of a shard."""
    results = await each_row(partial(fetch_bin, reader), shard, advance)
    return built_shard(results, IMAGES, reader.take_retried())


async def fetch_bin(reader: Reader, sampled: Row) -> Row | Reject:
    """Read one photograph, checked against the size and etag of the index."""
    if sampled["size"] > MAX_PHOTOGRAPH_BYTES:
        return Reject(sampled["id"], f"too large: {readable(sampled['size'])}")
    try:
        image = await reader.read(sampled["key"], sampled["size"], sampled["etag"])
    except ObjectError as error:
        return Reject(sampled["id"], str(error))
    return {"id": sampled["id"], "quantity": sampled["quantity"], "image": image}


if __name__ == "__main__":
    run_stage("fetch", main)
