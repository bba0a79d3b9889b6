"""What people decided on the pages of earlier audits, from the files decisions.csv."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from stages.runtime.errors import UserError
from tools.audit.counts import CountsError, match_ids, parse_count, parse_id, read_sheet
from tools.audit.photographs import Photographs


class Decision(NamedTuple):
    """A row of decisions.csv: what somebody decided about a bin's record, and when.

    `photograph` is the fingerprint of the file that was looked at, and `expected` identifies the
    record. `counted` is None if the decision is "unclear", and as expected if it is "other_items":
    then only the items of the record are wrong. In lists with a sample, the bin was drawn at random
    from the `part_bins` bins of its `part`; in others, `part_bins` is None. `flagged_at` is the
    smallest false-alarm share at which the bin is flagged, if it was.
    """

    id: str
    expected: int
    counted: int | None
    decision: str
    decided_at: str
    photograph: str
    audit: str
    part: str
    part_bins: int | None
    flagged_at: float | None

    @property
    def is_wrong(self) -> bool:
        return self.decision in ("wrong", "other_items")


COLUMNS = Decision._fields


def fingerprint(data: bytes) -> str:
    """Identifies the bytes of a photograph; the prefix keeps spreadsheets from seeing a number."""
    return f"sha256:{hashlib.sha256(data).hexdigest()[:16]}"


class Decided(NamedTuple):
    """Decisions by id, and what was unusual about reading each file."""

    by_id: dict[str, Decision]
    notes: list[str]


def read_decisions(paths: Sequence[Path], photographs: Sequence[str]) -> Decided:
    """The decisions in these files; of several about a bin, the one made last.

    Lost leading zeros are restored by the ids of the photographs. Raises UserError if a file cannot
    be used.
    """
    found: list[Decision] = []
    notes = []
    for path in paths:
        try:
            rows, form = parse_decisions(path.read_bytes())
        except CountsError as error:
            raise UserError(f"{path}: {error}") from None
        matched = match_ids(latest(rows), photographs)
        found += [one._replace(id=bin_id) for bin_id, one in matched.rows.items()]
        unusual = [*([f"read as {form}"] if form else []), *matched.notes]
        notes += [f"{path}: {'; '.join(unusual)}"] if unusual else []
    refuse_impossible_parts(latest(found).values())
    return Decided(latest(found), notes)


def latest(decisions: Iterable[Decision]) -> dict[str, Decision]:
    """Each bin's last decision; of several made at the same time, the one that comes last."""
    return {one.id: one for one in sorted(decisions, key=lambda one: one.decided_at)}


def refuse_impossible_parts(decisions: Iterable[Decision]) -> None:
    """Raise UserError if more bins of a part were decided on than it has."""
    sizes = defaultdict(list)
    for one in decisions:
        sizes[one.audit, one.part].append(one.part_bins)
    for (audit, part), bins in sizes.items():
        fewest = min((number for number in bins if number is not None), default=len(bins))
        if fewest < len(bins):
            raise UserError(
                f"{len(bins)} bins of {audit} were decided on in the part {part!r}, which has"
                f" {fewest} according to part_bins: save the file again from the page of the audit"
            )


def still_hold(
    decisions: Mapping[str, Decision], counts: Mapping[str, int], photographs: Photographs
) -> dict[str, Decision]:
    """The decisions about bins with the same photograph and the same record as then."""
    same_record = [
        bin_id for bin_id, one in decisions.items() if counts.get(bin_id) == one.expected
    ]
    contents = photographs.pick(same_record)
    seen = {content.id: fingerprint(content.data) for content in contents if not content.problem}
    return {
        bin_id: decisions[bin_id]
        for bin_id in same_record
        if seen.get(bin_id) == decisions[bin_id].photograph
    }


def still_needed(
    decisions: Mapping[str, Decision], settled: Collection[str], counts: Collection[str]
) -> list[Decision]:
    """The decisions to keep: those that hold, and those about bins that this audit has not seen."""
    return [one for bin_id, one in decisions.items() if bin_id in settled or bin_id not in counts]


def parse_decisions(data: bytes) -> tuple[list[Decision], str]:
    """The rows of a file, and how it was read if unusual. Raises CountsError if it is unusable."""
    sheet = read_sheet(data, [(name,) for name in COLUMNS])
    return [parse_row(line, cells, sheet.separator) for line, cells in sheet.rows], sheet.form


def parse_row(line: int, cells: Sequence[str], separator: str) -> Decision:
    row = dict(zip(COLUMNS, cells, strict=True))
    bin_id = parse_id(line, row["id"])
    numbers = {
        name: parse_count(line, bin_id, row[name], separator)
        for name in ("expected", "counted", "part_bins")
    }
    expected, counted = numbers["expected"], numbers["counted"]
    decision = {
        "right": counted == expected,
        "wrong": counted not in (expected, None),
        "other_items": counted == expected,
        "unclear": counted is None,
    }
    if expected is None or not decision.get(row["decision"]):
        raise CountsError(
            f"line {line}: expected {row['expected']!a:.20}, counted {row['counted']!a:.20} and"
            f" decision {row['decision']!a:.20} do not fit together: save the file again from the"
            " page of the audit"
        )
    return Decision(
        id=bin_id,
        expected=expected,
        counted=counted,
        decision=row["decision"],
        decided_at=parse_time(line, row["decided_at"]),
        photograph=matching(line, row, "photograph", r"(sha256:[0-9a-f]{16})?"),
        audit=matching(line, row, "audit", r"audit-[0-9a-f]{12}"),
        part=matching(line, row, "part", "flagged|other"),
        part_bins=numbers["part_bins"],
        flagged_at=parse_share(line, row),
    )


def parse_time(line: int, cell: str) -> str:
    """The time in UTC, written such that times sort as texts."""
    try:
        time = datetime.fromisoformat(cell)
        utc = time.replace(tzinfo=time.tzinfo or UTC).astimezone(UTC)
    except (OverflowError, ValueError):
        raise CountsError(
            f"line {line}: decided_at is {cell!a:.40}, but should be like 2026-01-31T08:00:00Z"
        ) from None
    return utc.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_share(line: int, row: Mapping[str, str]) -> float | None:
    cell = matching(line, row, "flagged_at", r"([0-9](?:[.,][0-9]+)?(?:e-[0-9]+)?)?")
    return float(cell.replace(",", ".")) if cell else None


def matching(line: int, row: Mapping[str, str], name: str, pattern: str) -> str:
    """The cell of a column. Raises CountsError if it is not of this form."""
    if not re.fullmatch(pattern, row[name]):
        raise CountsError(
            f"line {line}: {name} is {row[name]!a:.40}, which no page of an audit writes: save the"
            " file again from the page"
        )
    return row[name]
