"""The counts that the inventory system expects: a CSV, the records' JSON, or a column of shards."""

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from stages.collecting.bucket import RECORDS, Store
from stages.collecting.records import Record, RecordError, is_bin_id, parse_record
from stages.runtime.errors import UserError
from tools.audit.objects import Content, Listing, list_bins, open_folder, read_bins
from tools.audit.photographs import Photographs, ShardPhotographs, StoredPhotographs

Item = dict[str, Any]


class Records:
    """Files <id>.json right below `prefix`."""

    def __init__(self, store: Store, prefix: str) -> None:
        self.store = store
        self.listing: Listing = list_bins(store, prefix, "json")

    def items(self, ids: Sequence[str]) -> dict[str, list[Item]]:
        """What the records of these bins list, as parse_record gives it."""
        objects = self.listing.objects.filter(pc.field("id").isin(pa.array(ids, pa.string())))
        items = {}
        for content in read_bins(self.store, objects):
            # One that changed since its count was read has none to show.
            with suppress(RecordError):
                items[content.id] = parse(content)["items"]
        return items


@dataclass(frozen=True)
class Expected:
    """`counts` by id, and for other bins that `place` names, why they have none."""

    place: str
    counts: dict[str, int] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    records: Records | None = None


def find_expected(path: Path | None, photographs: Photographs) -> Expected:
    """The counts at `path`, or those that come with the photographs. Raises UserError if none."""
    if path is not None and path.is_dir():
        return read_records(str(path), Records(open_folder(path), ""))
    if path is not None:
        return read_counts(path)
    if isinstance(photographs, ShardPhotographs):
        return read_column(photographs)
    if isinstance(photographs, StoredPhotographs) and photographs.in_bucket_layout:
        return read_records(
            f"{photographs.place.rstrip('/')}/{RECORDS}", Records(photographs.store, RECORDS)
        )
    raise UserError(
        f"no counts come with the photographs in {photographs.place}: give --expected counts.csv"
    )


def read_records(place: str, records: Records) -> Expected:
    objects = records.listing.objects
    if not len(objects):
        raise UserError(f"there are no records <id>.json in {place}: give --expected")
    found = Expected(place, records=records)
    reading = read_bins(records.store, objects)
    for content in tqdm(reading, "records", len(objects), disable=None, leave=False):
        try:
            found.counts[content.id] = parse(content)["quantity"]
        except RecordError as error:
            found.problems[content.id] = f"unusable record: {error}"
    return found


def parse(content: Content) -> Record:
    """Raises RecordError also where the file cannot be had."""
    if content.problem:
        raise RecordError(content.problem)
    return parse_record(content.data)


def read_column(photographs: ShardPhotographs) -> Expected:
    """Those of the column quantity."""
    found = Expected("their column quantity")
    for shard in photographs.shards:
        if "quantity" not in shard.rows.column_names:
            raise UserError(f"{shard.path} has no column quantity: give --expected counts.csv")
        rows = shard.rows.filter(pc.field("quantity").is_valid())
        found.counts.update(zip(rows["id"].to_pylist(), rows["quantity"].to_pylist(), strict=True))
    return found


def read_counts(path: Path) -> Expected:
    """A CSV. Raises UserError, with the line, where it is not as it has to be.

    An empty count is no count.
    """
    found = Expected(str(path))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            column = count_column(path, reader.fieldnames or [])
            for row in reader:
                bin_id, count = row["id"], (row[column] or "").strip()
                check_row(f"{path}: line {reader.line_num}", bin_id, count)
                if bin_id in found.counts or bin_id in found.problems:
                    raise UserError(f"{path} has the bin {bin_id} twice: keep one")
                if count:
                    found.counts[bin_id] = int(count)
                else:
                    found.problems[bin_id] = "no expected count"
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8: save it as `CSV UTF-8`") from None
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num}: no CSV: {error}") from None
    return found


def count_column(path: Path, header: Sequence[str]) -> str:
    columns = [name for name in ("expected", "quantity") if name in header]
    if "id" not in header or not columns:
        raise UserError(
            f"{path}: its first line is {','.join(header)!a:.80}, and wants the columns id and"
            " expected, with commas in between"
        )
    return columns[0]


def check_row(place: str, bin_id: str, count: str) -> None:
    if not is_bin_id(bin_id or ""):
        raise UserError(f"{place}: {bin_id!a:.80} is no bin's id")
    if count and not re.fullmatch("[0-9]{1,9}", count):
        raise UserError(f"{place}: the count of {bin_id} is {count!a:.80}, not a whole number")


def left_out(photographs: Photographs, expected: Expected) -> Iterator[str]:
    """Keys of files whose names are no ids, of photographs and of records."""
    if isinstance(photographs, StoredPhotographs):
        yield from photographs.left_out
    if expected.records is not None:
        yield from expected.records.listing.left_out
