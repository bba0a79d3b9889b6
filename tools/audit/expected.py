"""Expected counts: from a CSV file, the JSON records, or a column of the Parquet files."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from tqdm import tqdm

from stages.collecting.bucket import RECORDS
from stages.collecting.ids import RECORD
from stages.collecting.records import Record, RecordError, parse_record
from stages.networks.calibration import Floats
from stages.runtime.errors import UserError
from stages.scoring.witness import record_numbers
from tools.audit.counts import CountsError, match_ids, parse_counts
from tools.audit.photographs import Content, Files, Photographs, Shards, open_folder

NO_COUNT = "no expected count"
UNCLEAR = "unclear which row has its count, since ids lost their leading zeros"
_RECORDS_AT_ONCE = 4096


@dataclass(frozen=True)
class Expected:
    """The counts found at `place`, by id.

    `problems` says why other bins have none, and `notes` what was unusual about reading.
    """

    place: str
    counts: dict[str, int] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    records: Files | None = None
    #: The numbers of the records' items, if they were asked for and are known.
    numbers: dict[str, Floats] = field(default_factory=dict)

    @property
    def left_out(self) -> list[str]:
        """Records whose file names are not ids."""
        return [] if self.records is None else self.records.left_out

    def drop(self, ids: Iterable[str]) -> None:
        """Forget these bins."""
        for bin_id in ids:
            self.counts.pop(bin_id, None)
            self.problems.pop(bin_id, None)
            self.numbers.pop(bin_id, None)

    def items(self, ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """The items in the records of these bins, as parse_record returns them."""
        items = {}
        for content in self.records.pick(ids) if self.records else ():
            # A record may have changed since its count was read.
            with suppress(RecordError):
                items[content.id] = parse(content)["items"]
        return items


def find_expected(
    path: Path | None, photographs: Photographs, *, measured: bool = False
) -> Expected:
    """The counts at `path`, or beside the photographs. Raises UserError if there are none.

    `measured` asks for the numbers of the items too, which only records have.
    """
    if path is not None and path.is_dir():
        return read_records(Files(str(path), open_folder(path), "", RECORD), measured=measured)
    if path is not None:
        return read_counts(path, photographs.ids)
    if isinstance(photographs, Shards):
        return read_column(photographs)
    if photographs.prefix:
        place = f"{photographs.place.rstrip('/')}/{RECORDS}"
        return read_records(Files(place, photographs.store, RECORDS, RECORD), measured=measured)
    raise UserError(f"{photographs.place} has photographs but no counts: add --expected counts.csv")


def read_records(records: Files, *, measured: bool) -> Expected:
    if not records.ids:
        raise UserError(
            f"there are no records <id>.json in {records.place}: add --expected counts.csv"
        )
    found = Expected(records.place, records=records)
    contents = chain.from_iterable(records.parts(0, _RECORDS_AT_ONCE))
    for content in tqdm(contents, "records", len(records.ids), disable=None, leave=False):
        try:
            record = parse(content)
        except RecordError as error:
            found.problems[content.id] = f"unusable record: {error}"
            continue
        found.counts[content.id] = record["quantity"]
        if measured:
            found.numbers[content.id] = record_numbers(record["items"])
    return found


def parse(content: Content) -> Record:
    """Raises RecordError if the file could not be read or the record is unusable."""
    if content.problem:
        raise RecordError(content.problem)
    return parse_record(content.data)


def read_column(photographs: Shards) -> Expected:
    found = Expected("the column quantity")
    for path, rows in photographs.rows.items():
        if "quantity" not in rows.column_names:
            raise UserError(f"{path} has no column quantity: add --expected counts.csv")
        known = rows.filter(pc.field("quantity").is_valid()).to_pylist()
        found.counts.update({row["id"]: row["quantity"] for row in known})
    return found


def read_counts(path: Path, photographs: Iterable[str]) -> Expected:
    """The counts in a CSV file for photographs with these ids. Raises UserError if unusable."""
    try:
        listed = parse_counts(path.read_bytes())
    except CountsError as error:
        raise UserError(f"{path}: {error}") from None
    matched = match_ids(listed.rows, photographs)
    problems = dict.fromkeys(matched.unclear, UNCLEAR)
    notes = [f"read as {listed.form}"] if listed.form else []
    found = Expected(str(path), problems=problems, notes=[*notes, *matched.notes])
    for bin_id, count in matched.rows.items():
        if count is None:
            found.problems[bin_id] = NO_COUNT
        else:
            found.counts[bin_id] = count
    return found
