"""Read the drawn bins' photographs, byte for byte, into the Parquet shards of data/raw."""

from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from obstore.store import LocalStore

from stages.core.bucket import (
    IN_FLIGHT,
    PHOTOGRAPHS,
    WINDOW,
    ObjectError,
    Store,
    explained,
    list_objects,
    open_bucket,
    read_object,
)
from stages.core.command import run_stage
from stages.core.files import digest, publish_folder, sha256_file, unfinished
from stages.core.params import load_params
from stages.core.retries import Retries
from stages.core.shards import (
    IMAGES,
    Reject,
    RejectLimit,
    Row,
    build_shards,
    shards_of,
    table_digest,
    whole_parquet,
    write_rejects,
)

SUBSET = Path("data/subset.parquet")
OUT = Path("data/raw")
REJECTS = Path("data/unfetched.csv")


def main() -> str:
    params = load_params()
    limit = RejectLimit("fetch.max_rejects", params.fetch.max_rejects)
    with whole_parquet(SUBSET):
        subset = pq.read_table(SUBSET)
    retries = Retries()
    with explained(params.bucket):
        store = open_bucket(params.bucket)
        state = folder_state(store, subset)
        key = digest(params.bucket, params.fetch.shard_bins, sha256_file(SUBSET), state)
        with unfinished("fetch", key) as folder:
            shards, rejects = build_shards(
                folder,
                shards_of(subset, params.fetch.shard_bins),
                partial(fetch_bin, store, retries),
                IMAGES,
                limit,
                workers=IN_FLIGHT,
                window=WINDOW,
                unit=" photographs",
            )
            write_rejects(REJECTS, rejects)
            publish_folder(shards, OUT)
    fetched = len(subset) - len(rejects)
    return f"{fetched} photographs; {len(rejects)} not to be had ({REJECTS}){retries.summary()}"


def folder_state(store: Store, subset: pa.Table) -> str | None:
    """What changes with any drawn photograph in a folder. None in S3: the subset has its etags."""
    if not isinstance(store, LocalStore):
        return None
    listing = list_objects(store, PHOTOGRAPHS)
    return table_digest(listing.filter(pc.is_in(listing["key"], subset["key"].combine_chunks())))


def fetch_bin(store: Store, retries: Retries, drawn: Row) -> Row | Reject:
    """Read one photograph, checked against the size and etag of the index."""
    try:
        image = read_object(store, drawn["key"], drawn["size"], drawn["etag"], retries)
    except ObjectError as error:
        return Reject(drawn["id"], str(error))
    return {"id": drawn["id"], "quantity": drawn["quantity"], "image": image}


if __name__ == "__main__":
    run_stage("fetch", main)
