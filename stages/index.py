"""List the bucket and read every record: data/index.parquet, a row per bin."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.collecting.advice import explained
from stages.collecting.bucket import PHOTOGRAPHS, RECORDS, Store, open_bucket
from stages.collecting.failures import ObjectError
from stages.collecting.ids import PHOTOGRAPH, RECORD, named_by_id
from stages.collecting.listing import list_objects
from stages.collecting.reading import Reader, summary
from stages.collecting.records import (
    INDEX_SCHEMA,
    MAX_RECORD_BYTES,
    RecordError,
    parse_record,
)
from stages.formats.shards import Reject, Row, shard_paths, table_digest, whole_parquet
from stages.formats.tables import write_json
from stages.runtime import paths
from stages.runtime.command import run_stage
from stages.runtime.errors import UserError
from stages.runtime.files import atomic_write, digest
from stages.runtime.params import load_params
from stages.runtime.work import resumable
from stages.sharding.building import (
    BuiltShard,
    RejectLimit,
    Shard,
    build_shards,
    built_shard,
    each_row,
    first_finished_row,
    plan_shards,
)
from stages.sharding.executors import executor

# A killed run resumes after the last finished part; so many parts are read at once.
PART_RECORDS = 5_000
PARTS_AT_ONCE = 2


def main() -> str:
    params = load_params()
    limit = RejectLimit("index.max_rejects", params.index.max_rejects)
    retried = Counter[str]()
    with explained(params.bucket):
        store = open_bucket(params.bucket)
        listing, left_out = list_bins(store, params.bucket.url, retried)
        with resumable("index", digest(params.bucket.url, table_digest(listing))) as folder:
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
            counts = summarize(len(listing), indexed, rejects, left_out)
            write_json(paths.INDEX_COUNTS, counts)
    rejected = f"records rejected: {len(rejects)} {counts['rejected'] or ''}".rstrip()
    others = ", ".join(f"{number} {what}" for what, number in counts["left_out"].items())
    left_out_too = f"; left out: {others}" if others else ""
    return f"{indexed} bins; {rejected}{left_out_too}{summary(retried + of_records)}"


def list_bins(store: Store, url: str, retried: Counter[str]) -> tuple[pa.Table, dict[str, int]]:
    """The bins that have a record and a photograph, and how many files are left out, by reason.

    Raises UserError where there are no such bins.
    """
    records, odd_records = named_by_id(list_objects(store, RECORDS, retried), RECORDS, RECORD)
    photographs, odd_photographs = named_by_id(
        list_objects(store, PHOTOGRAPHS, retried), PHOTOGRAPHS, PHOTOGRAPH
    )
    bins = join_listings(records, photographs)
    if not len(records):
        raise UserError(f"{url} has no {RECORDS}<id>.json: check bucket.url")
    if not len(photographs):
        raise UserError(f"{url} has no {PHOTOGRAPHS}<id>.jpg: check bucket.url")
    if not len(bins):
        raise UserError(
            f"{url} has {len(records)} records and {len(photographs)} photographs, but no bin has"
            " both: check their names, <id>.json and <id>.jpg"
        )
    return bins, {
        "records without a photograph": len(records) - len(bins),
        "photographs without a record": len(photographs) - len(bins),
        "files whose names are not ids": len(odd_records) + len(odd_photographs),
    }


def join_listings(records: pa.Table, photographs: pa.Table) -> pa.Table:
    """A row per bin that has both, sorted by id: its photograph's key, size, etag and stamp.

    The record's own are in record_key, record_size, record_etag and record_stamp.
    """
    records = records.rename_columns(
        [name if name == "id" else f"record_{name}" for name in records.column_names]
    )
    return records.join(photographs, "id", join_type="inner").sort_by("id")


async def index_shard(reader: Reader, shard: Shard, advance: Callable[[int], object]) -> BuiltShard:
    """Read and parse the records of listed bins."""
    results = await each_row(partial(index_bin, reader), shard, advance)
    return built_shard(results, INDEX_SCHEMA, reader.take_retried())


async def index_bin(reader: Reader, listed: Row) -> Row | Reject:
    """Read and parse one record."""
    bin_id = listed["id"]
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


def summarize(
    records: int, indexed: int, rejects: list[Reject], left_out: dict[str, int]
) -> dict[str, Any]:
    """What data/index.json says: how many records were read, and what was not used, and why."""
    reasons = Counter(reject.reason.partition(":")[0] for reject in rejects)
    return {
        "records": records,
        "indexed": indexed,
        "left_out": {what: number for what, number in left_out.items() if number},
        "rejected": dict(sorted(reasons.items())),
        "examples": [reject._asdict() for reject in rejects[:100]],
    }


if __name__ == "__main__":
    run_stage("index", main)
