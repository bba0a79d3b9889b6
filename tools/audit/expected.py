"""The counts that the inventory system expects: a CSV, the records' JSON, or a column of shards."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from tqdm import tqdm

from stages.collecting.bucket import RECORDS
from stages.collecting.records import Record, RecordError, parse_record
from stages.runtime.errors import UserError
from tools.audit.counts import CountsError, Listed, Matched, match_ids, parse_counts
from tools.audit.photographs import Content, Files, Photographs, Shards, open_folder

NO_COUNT = "no expected count"
UNCLEAR = "unclear which row has its count, since ids lost their leading zeros"
_RECORDS_AT_ONCE = 4096


@dataclass(frozen=True)
class Expected:
    """`counts` by id, why other bins that `place` names have none, and how it was read."""

    place: str
    counts: dict[str, int] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
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
        return read_records(Files(str(path), open_folder(path), "", "json"))
    if path is not None:
        return read_counts(path, photographs.ids)
    if isinstance(photographs, Shards):
        return read_column(photographs)
    if photographs.prefix:
        place = f"{photographs.place.rstrip('/')}/{RECORDS}"
        return read_records(Files(place, photographs.store, RECORDS, "json"))
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


def read_counts(path: Path, photographs: Iterable[str]) -> Expected:
    """A CSV, about photographs with these ids. Raises UserError where it cannot be read."""
    try:
        listed = parse_counts(path.read_bytes())
    except CountsError as error:
        raise UserError(f"{path}: {error}") from None
    matched = match_ids(listed.rows, photographs)
    problems = dict.fromkeys(matched.unclear, UNCLEAR)
    found = Expected(str(path), problems=problems, notes=describe(listed, matched))
    for bin_id, count in matched.rows.items():
        if count is None:
            found.problems[bin_id] = NO_COUNT
        else:
            found.counts[bin_id] = count
    return found


def describe(listed: Listed, matched: Matched) -> list[str]:
    """How a CSV was read, where that is not the usual way."""
    notes = [f"read as {listed.form}"] if listed.form else []
    if matched.padded:
        notes.append(f"restored the leading zeros of {matched.padded} ids")
    if matched.unclear:
        notes.append(
            f"left out {len(matched.unclear)} bins, since ids lost their leading zeros"
            f" ({next(iter(matched.unclear.values()))}); export the column id as text"
        )
    return notes
