"""The counts that the inventory system expects: a CSV, the records' JSON, or a column of shards."""

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from tqdm import tqdm

from stages.collecting.bucket import RECORDS
from stages.collecting.ids import RECORD, is_bin_id
from stages.collecting.records import Record, RecordError, parse_record
from stages.runtime.errors import UserError
from tools.audit.photographs import Content, Files, Photographs, Shards, open_folder

_RECORDS_AT_ONCE = 4096


@dataclass(frozen=True)
class Expected:
    """`counts` by id, and why other bins that `place` names have none."""

    place: str
    counts: dict[str, int] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    records: Files | None = None

    @property
    def left_out(self) -> list[str]:
        """Files of records whose names are not ids."""
        return [] if self.records is None else self.records.left_out

    def items(self, ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """What the records of these bins list, as parse_record gives it."""
        items = {}
        for content in self.records.pick(ids) if self.records else ():
            # A record that has changed since its count was read may list nothing.
            with suppress(RecordError):
                items[content.id] = parse(content)["items"]
        return items


def find_expected(path: Path | None, photographs: Photographs) -> Expected:
    """The counts at `path`, or those beside the photographs. Raises UserError if there are none."""
    if path is not None and path.is_dir():
        return read_records(Files(str(path), open_folder(path), "", RECORD))
    if path is not None:
        return read_counts(path)
    if isinstance(photographs, Shards):
        return read_column(photographs)
    if photographs.prefix:
        place = f"{photographs.place.rstrip('/')}/{RECORDS}"
        return read_records(Files(place, photographs.store, RECORDS, RECORD))
    raise UserError(
        f"{photographs.place} has photographs but no counts: give --expected counts.csv"
    )


def read_records(records: Files) -> Expected:
    if not records.ids:
        raise UserError(f"there are no records <id>.json in {records.place}: give --expected")
    found = Expected(records.place, records=records)
    contents = chain.from_iterable(records.parts(0, _RECORDS_AT_ONCE))
    for content in tqdm(contents, "records", len(records.ids), disable=None, leave=False):
        try:
            found.counts[content.id] = parse(content)["quantity"]
        except RecordError as error:
            found.problems[content.id] = f"unusable record: {error}"
    return found


def parse(content: Content) -> Record:
    """Raises RecordError also where the file could not be read."""
    if content.problem:
        raise RecordError(content.problem)
    return parse_record(content.data)


def read_column(photographs: Shards) -> Expected:
    found = Expected("their column quantity")
    for path, rows in photographs.rows.items():
        if "quantity" not in rows.column_names:
            raise UserError(f"{path} has no column quantity: give --expected counts.csv")
        known = rows.filter(pc.field("quantity").is_valid()).to_pylist()
        found.counts.update({row["id"]: row["quantity"] for row in known})
    return found


def read_counts(path: Path) -> Expected:
    """A CSV, in which an empty count means that there is none. Raises UserError with the line."""
    found = Expected(str(path))
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            for line, bin_id, count in read_rows(path, csv.DictReader(file, strict=True)):
                check_row(f"{path}: line {line}", bin_id, count)
                if bin_id in found.counts or bin_id in found.problems:
                    raise UserError(f"{path} lists the bin {bin_id} twice: keep one")
                if count:
                    found.counts[bin_id] = int(count)
                else:
                    found.problems[bin_id] = "no expected count"
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8: save it as `CSV UTF-8`") from None
        except csv.Error as error:
            raise UserError(f"{path} is not a CSV: {error}") from None
    return found


def read_rows(path: Path, reader: "csv.DictReader[str]") -> Iterator[tuple[int, str, str]]:
    """Line, id and count of each row."""
    header = reader.fieldnames or []
    columns = [name for name in ("expected", "quantity") if name in header]
    if "id" not in header or not columns:
        raise UserError(
            f"{path}: its first line is {','.join(header)!a:.80}, but should name the columns id"
            " and expected, separated by commas"
        )
    for row in reader:
        yield reader.line_num, row["id"] or "", (row[columns[0]] or "").strip()


def check_row(place: str, bin_id: str, count: str) -> None:
    if not is_bin_id(bin_id):
        raise UserError(f"{place}: {bin_id!a:.80} is not a bin's id")
    if count and not re.fullmatch("[0-9]{1,9}", count):
        raise UserError(f"{place}: the count of {bin_id} is {count!a:.80}, not a whole number")
