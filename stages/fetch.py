"""Read the drawn bins' photographs, byte for byte, into the Parquet shards of data/raw."""

from collections.abc import Sequence
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from obstore.store import LocalStore

from stages.collecting.awaiting import await_in_order
from stages.collecting.bucket import (
    IN_FLIGHT,
    PHOTOGRAPHS,
    ObjectError,
    Store,
    explained,
    list_objects,
    open_bucket,
    read_object,
    window_of,
)
from stages.collecting.retries import Retries
from stages.formats.shards import IMAGES, Reject, Row, table_digest, whole_parquet, write_rejects
from stages.runtime import paths
from stages.runtime.command import run_stage
from stages.runtime.files import digest, sha256_file
from stages.runtime.params import load_params
from stages.runtime.space import on_one_disk, readable, require_space
from stages.runtime.work import publish_folder, unfinished
from stages.sharding.building import (
    RejectLimit,
    Shard,
    ShardMaker,
    build_shards,
    missing_shards,
    shards_of,
)
from stages.sharding.executors import executor

WHAT = "the photographs to fetch"
# The real ones have up to 260 kB, those of good cameras 10 MB. All that are read at once are held.
MAX_PHOTOGRAPH_BYTES = 16 * 1024 * 1024


def main() -> str:
    params = load_params()
    limit = RejectLimit("fetch.max_rejects", params.fetch.max_rejects)
    with whole_parquet(paths.SUBSET):
        subset = pq.read_table(paths.SUBSET)
    retries = Retries()
    with explained(params.bucket):
        store = open_bucket(params.bucket)
        state = folder_state(store, subset)
        key = digest(params.bucket, params.fetch.shard_bins, sha256_file(paths.SUBSET), state)
        with unfinished("fetch", key) as folder:
            planned = shards_of(subset, params.fetch.shard_bins, "size")
            require_space(folder, bytes_to_fetch(missing_shards(folder, planned)), WHAT)
            if not on_one_disk(folder, paths.RAW.parent):
                require_space(paths.RAW.parent, bytes_to_fetch(planned), WHAT)
            window = window_of(min(pc.max(subset["size"]).as_py(), MAX_PHOTOGRAPH_BYTES))
            work = partial(await_in_order, partial(fetch_bin, store, retries))
            shards, rejects = build_shards(
                ShardMaker(folder, work, IMAGES, min(IN_FLIGHT, window), window, retries),
                planned,
                limit,
                unit=" photographs",
                executor=executor(params.run.executor),
            )
            write_rejects(paths.UNFETCHED, rejects)
            publish_folder(shards, paths.RAW)
    fetched = len(subset) - len(rejects)
    missing = f"{len(rejects)} not to be had ({paths.UNFETCHED})"
    return f"{fetched} photographs; {missing}{retries.summary()}"


def folder_state(store: Store, subset: pa.Table) -> str | None:
    """What changes with any drawn photograph in a folder. None in S3: the subset has its etags."""
    if not isinstance(store, LocalStore):
        return None
    listing = list_objects(store, PHOTOGRAPHS)
    return table_digest(listing.filter(pc.is_in(listing["key"], subset["key"].combine_chunks())))


def bytes_to_fetch(shards: Sequence[Shard[Row]]) -> int:
    """What the photographs of the shards take."""
    sizes = (row["size"] for shard in shards for row in shard.load())
    return sum(size for size in sizes if size <= MAX_PHOTOGRAPH_BYTES)


async def fetch_bin(store: Store, retries: Retries, drawn: Row) -> Row | Reject:
    """Read one photograph, checked against the size and etag of the index."""
    if drawn["size"] > MAX_PHOTOGRAPH_BYTES:
        return Reject(drawn["id"], f"too large: {readable(drawn['size'])}")
    try:
        image = await read_object(store, drawn["key"], drawn["size"], drawn["etag"], retries)
    except ObjectError as error:
        return Reject(drawn["id"], str(error))
    return {"id": drawn["id"], "quantity": drawn["quantity"], "image": image}


if __name__ == "__main__":
    run_stage("fetch", main)
