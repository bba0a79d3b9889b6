"""Read the drawn bins' photographs, byte for byte, into the Parquet shards of data/raw."""

from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from stages.core.bucket import (
    IN_FLIGHT,
    WINDOW,
    ObjectError,
    Store,
    explained,
    open_bucket,
    read_object,
)
from stages.core.command import run_stage
from stages.core.files import digest, publish_folder, sha256_file, unfinished
from stages.core.params import load_params
from stages.core.shards import (
    IMAGES,
    Reject,
    RejectLimit,
    Row,
    build_shards,
    shards_of,
    write_rejects,
)

SUBSET = Path("data/subset.parquet")
OUT = Path("data/raw")
REJECTS = Path("data/unfetched.csv")


def main() -> str:
    params = load_params()
    limit = RejectLimit("fetch.max_rejects", params.fetch.max_rejects)
    subset = pq.read_table(SUBSET)
    key = digest(params.bucket, params.fetch.shard_bins, sha256_file(SUBSET))
    with explained(params.bucket), unfinished("fetch", key) as folder:
        shards, rejects = build_shards(
            folder,
            shards_of(subset, params.fetch.shard_bins),
            partial(fetch_bin, open_bucket(params.bucket)),
            IMAGES,
            limit,
            workers=IN_FLIGHT,
            window=WINDOW,
            unit=" photographs",
        )
        write_rejects(REJECTS, rejects)
        publish_folder(shards, OUT)
    return f"{len(subset) - len(rejects)} photographs; {len(rejects)} not to be had ({REJECTS})"


def fetch_bin(store: Store, drawn: Row) -> Row | Reject:
    """Read one photograph, checked against the size and etag of the index."""
    try:
        image = read_object(store, drawn["key"], drawn["size"], drawn["etag"])
    except ObjectError as error:
        return Reject(drawn["id"], str(error))
    return {"id": drawn["id"], "quantity": drawn["quantity"], "image": image}


if __name__ == "__main__":
    run_stage("fetch", main)
