"""List the bucket and read every record: data/index.parquet, a row per bin."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.collecting.advice import explained
from stages.collecting.bucket import PHOTOGRAPHS, RECORDS, open_bucket
from stages.collecting.failures import ObjectError
from stages.collecting.listing import LISTING, list_objects
from stages.collecting.reading import Reader, summary
from stages.collecting.records import (
    INDEX_SCHEMA,
    MAX_RECORD_BYTES,
    RecordError,
    is_bin_id,
    parse_record,
)
from stages.formats.shards import Reject, Row, shard_paths, table_digest, whole_parquet
from stages.formats.tables import write_json
from stages.runtime import paths
from stages.runtime.command import run_stage
from stages.runtime.errors import UserError
from stages.runtime.files import atomic_write, digest
from stages.runtime.params import load_params
from stages.runtime.work import unfinished
from stages.sharding.building import (
    MadeShard,
    RejectLimit,
    Shard,
    build_shards,
    each_row,
    first_finished_row,
    made_of,
    plan_shards,
)
from stages.sharding.executors import executor

# The unit in which a killed run continues, and how many are read at once.
PART_RECORDS = 5_000
PARTS_AT_ONCE = 2


def main() -> str:
    params = load_params()
    limit = RejectLimit("index.max_rejects", params.index.max_rejects)
    retried = Counter[str]()
    with explained(params.bucket):
        store = open_bucket(params.bucket)
        photographs = list_objects(store, PHOTOGRAPHS, retried)
        listing = join_listings(list_objects(store, RECORDS, retried), photographs)
        if not len(listing):
            raise UserError(f"{params.bucket.url} has no {RECORDS}<id>.json: check bucket.url")
        with unfinished("index", digest(params.bucket.url, table_digest(listing))) as folder:
            planned = plan_shards(listing, PART_RECORDS)
            before = first_finished_row(folder, planned)
            reader = Reader(store, witness=before["record_key"] if before else None)
            parts, rejects, of_records = build_shards(
                partial(index_shard, reader),
                folder,
                planned,
                limit,
                unit=" records",
                executor=executor("local", PARTS_AT_ONCE),
            )
            indexed = concatenate(parts, paths.INDEX)
            counts = summarize(len(listing), indexed, rejects)
            write_json(paths.INDEX_COUNTS, counts)
    left_out = f"{len(rejects)} records left out {counts['rejected'] or ''}".rstrip()
    return f"{indexed} bins; {left_out}{summary(retried + of_records)}"


def join_listings(records: pa.Table, photographs: pa.Table) -> pa.Table:
    """A row per record, sorted by id, with its photograph's key, size, etag and stamp or nulls.

    The record's own are in record_key, record_size, record_etag and record_stamp.
    """
    records = _with_ids(records, RECORDS, ".json")
    records = records.rename_columns({name: f"record_{name}" for name in LISTING.names})
    photographs = _with_ids(photographs, PHOTOGRAPHS, ".jpg")
    return records.join(photographs, "id", join_type="left outer").sort_by("id")


def _with_ids(listing: pa.Table, prefix: str, suffix: str) -> pa.Table:
    files = listing.filter(pc.ends_with(listing["key"], suffix))
    ids = pc.utf8_slice_codeunits(files["key"], len(prefix))
    return files.append_column("id", pc.utf8_slice_codeunits(ids, 0, -len(suffix)))


async def index_shard(reader: Reader, shard: Shard, advance: Callable[[int], object]) -> MadeShard:
    """Read and parse the records of listed bins."""
    results = await each_row(partial(index_bin, reader), shard, advance)
    return made_of(results, INDEX_SCHEMA, reader.take_retried())


async def index_bin(reader: Reader, listed: Row) -> Row | Reject:
    """Read and parse one record."""
    bin_id = listed["id"]
    if not is_bin_id(bin_id):
        return Reject(bin_id, "impossible id")
    if listed["key"] is None:
        return Reject(bin_id, "no photograph")
    if listed["record_size"] > MAX_RECORD_BYTES:
        return Reject(bin_id, "too large")
    try:
        data = await reader.read(listed["record_key"], listed["record_size"], listed["record_etag"])
        record = parse_record(data)
    except ObjectError as error:
        return Reject(bin_id, f"unreadable: {error}")
    except RecordError as error:
        return Reject(bin_id, str(error))
    return {
        "id": bin_id,
        **record,
        "key": listed["key"],
        "size": listed["size"],
        "etag": listed["etag"],
    }


def concatenate(parts: Path, out: Path) -> int:
    """Write all parts into one file, one at a time; the number of rows."""
    rows = 0
    with (
        atomic_write(out) as temporary,
        pq.ParquetWriter(temporary, INDEX_SCHEMA, compression="zstd") as writer,
    ):
        for part in shard_paths(parts):
            with whole_parquet(part):
                table = pq.read_table(part)
            writer.write_table(table)
            rows += len(table)
    return rows


def summarize(records: int, indexed: int, rejects: list[Reject]) -> dict[str, Any]:
    """What data/index.json says: how many records there are, and why some were left out."""
    reasons = Counter(reject.reason.partition(":")[0] for reject in rejects)
    return {
        "records": records,
        "indexed": indexed,
        "rejected": dict(sorted(reasons.items())),
        "examples": [reject._asdict() for reject in rejects[:100]],
    }


if __name__ == "__main__":
    run_stage("index", main)
