"""CSV files as spreadsheets and databases export them: from bytes to cells, ids and counts.

Only what is unambiguous is read. A count that could be two numbers, or a row that could mean two
bins, would cause a false alarm or hide a wrong record.
"""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Generic, NamedTuple, TypeVar

from stages.collecting.ids import is_bin_id

Value = TypeVar("Value")
#: The columns of a file of counts, each with the names that it may have.
COUNTS = (("id",), ("expected", "quantity"))
_SEPARATORS = {",": "", ";": "semicolon-separated", "\t": "tab-separated", "|": "pipe-separated"}
# How databases and spreadsheets export an empty cell.
_EMPTY = ("", "null", "nan", "n/a", "#n/a")


class CountsError(Exception):
    """The file cannot be read without guessing; the text says where, why, and what to do."""


class Sheet(NamedTuple):
    """The wanted cells of each row, with its line number, and how the file was read if unusual."""

    rows: list[tuple[int, list[str]]]
    separator: str
    form: str


class Listed(NamedTuple):
    """The count of each id, None where its cell is empty, and how the file was read if unusual."""

    rows: dict[str, int | None]
    form: str


class Matched(NamedTuple, Generic[Value]):
    """What the rows hold, by the ids of the photographs.

    `padded` is the number of ids whose lost leading zeros were restored. `unclear` explains, by id,
    why a bin was not matched: several rows could mean it, or its row could mean several bins.
    """

    rows: dict[str, Value]
    padded: int
    unclear: dict[str, str]

    @property
    def notes(self) -> list[str]:
        """What was unusual about the ids."""
        notes = []
        if self.padded:
            notes.append(f"ids whose lost leading zeros were restored: {self.padded}")
        if self.unclear:
            notes.append(
                f"bins left out, since ids lost their leading zeros: {len(self.unclear)}"
                f" ({next(iter(self.unclear.values()))}); export the column id as text"
            )
        return notes


def parse_counts(data: bytes) -> Listed:
    """Read the bytes of a CSV file. Raises CountsError if it is unusable or ambiguous."""
    sheet = read_sheet(data, COUNTS)
    rows: dict[str, int | None] = {}
    for line, (id_cell, count_cell) in sheet.rows:
        bin_id = parse_id(line, id_cell)
        if bin_id in rows:
            # Even with the same count, since an export of items has several rows per bin.
            raise CountsError(
                f"line {line} lists the bin {bin_id} again: keep one row for each bin"
            )
        rows[bin_id] = parse_count(line, bin_id, count_cell, sheet.separator)
    return Listed(rows, sheet.form)


def read_sheet(data: bytes, columns: Sequence[Sequence[str]]) -> Sheet:
    """The cells of these columns, each given by the names that it may have.

    Raises CountsError if the file is not a CSV or lacks a column.
    """
    text, encoding = decode(data)
    # Excel's first line `sep=;` is emptied rather than removed, so that lines keep their numbers.
    text = re.sub(r"\Asep=.(?=[\r\n])", "", text, flags=re.IGNORECASE)
    separator, positions = find_columns(text, columns)
    rows = [
        (line, [plain(cells[position]) for position in positions])
        for line, cells in read_rows(text, separator)
    ]
    return Sheet(rows, separator, ", ".join(filter(None, [encoding, _SEPARATORS[separator]])))


def decode(data: bytes) -> tuple[str, str]:
    """The text, and the name of its encoding unless that is UTF-8."""
    try:
        text, encoding = decode_utf(data)
    except UnicodeDecodeError:
        # Ids and counts are ASCII, so in other columns a wrong letter does no harm.
        text, encoding = data.decode("cp1252", errors="replace"), "Windows-1252"
    if "\0" in text:
        raise CountsError("this is not a text file: save or export the counts as CSV")
    return text, encoding


def decode_utf(data: bytes) -> tuple[str, str]:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16"), "UTF-16"
    # Without a byte order mark, the zero byte of the header's first letter gives it away.
    if data[:1] == b"\0":
        return data.decode("utf-16-be"), "UTF-16"
    if data[1:2] == b"\0":
        return data.decode("utf-16-le"), "UTF-16"
    return data.decode("utf-8-sig"), ""


def find_columns(text: str, columns: Sequence[Sequence[str]]) -> tuple[str, list[int]]:
    """The separator, found from the first row, and the positions of the columns."""
    found = []
    for separator in _SEPARATORS:
        with suppress(csv.Error, StopIteration):
            _, header = next(split(text, separator))
            names = [plain(cell).casefold() for cell in header]
            if not any({*allowed}.isdisjoint(names) for allowed in columns):
                found.append((separator, names))
    if len(found) != 1:
        first = text.lstrip().partition("\n")[0].rstrip()
        raise CountsError(
            f"the first line is {first!a:.80}, but should name the columns {describe(columns)}"
        )
    ((separator, names),) = found
    return separator, [find_column(names, allowed) for allowed in columns]


def find_column(names: Sequence[str], allowed: Sequence[str]) -> int:
    """The only position of an allowed name."""
    position, *others = [number for number, name in enumerate(names) if name in allowed]
    if others:
        raise CountsError(
            f"two columns could be {allowed[0]}: {names[position]} and {names[others[0]]}; keep one"
        )
    return position


def describe(columns: Sequence[Sequence[str]]) -> str:
    """Like "id and expected (or quantity)"."""
    *others, last = [f"{name} (or {', '.join(more)})" if more else name for name, *more in columns]
    return f"{', '.join(others)} and {last}"


def split(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, each with its line number."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    for cells in reader:
        if any(map(str.strip, cells)):
            yield reader.line_num, cells


def read_rows(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The rows below the header, filled up to its width, each with its line number."""
    try:
        rows = split(text, separator)
        _, header = next(rows)
        for line, cells in rows:
            if any(map(str.strip, cells[len(header) :])):
                raise CountsError(
                    f"line {line} has more cells than the first line: put quotes around a cell"
                    " that contains the separator"
                )
            yield line, cells + [""] * (len(header) - len(cells))
    except csv.Error as error:
        raise CountsError(f"this is not a CSV: {error}") from None


def plain(cell: str) -> str:
    """The cell without spaces around it, and without the ="..." that marks text in Excel."""
    marked = re.fullmatch('="([^"]*)"', cell.strip())
    return (marked[1] if marked else cell).strip()


def parse_id(line: int, cell: str) -> str:
    """The id, which may be written as the name of its photograph."""
    bin_id = re.sub(r"\.jpe?g$", "", cell, flags=re.IGNORECASE)
    if not is_bin_id(bin_id):
        raise CountsError(f"line {line}: {cell!a:.80} is not a bin's id")
    return bin_id


def parse_count(line: int, bin_id: str, cell: str, separator: str) -> int | None:
    """A whole number. Zeros as decimals are allowed, but not three, which could mean thousands."""
    if cell.casefold() in _EMPTY:
        return None
    point = "[.]" if separator == "," else "[.,]"
    whole = re.fullmatch(rf"([0-9]{{1,9}})(?:{point}(?:0|00|0000+))?", cell)
    if not whole:
        raise CountsError(
            f"line {line}: the count of {bin_id} is {cell!a:.80}, which is not clearly a whole"
            " number: write it like 12"
        )
    return int(whole[1])


def match_ids(rows: Mapping[str, Value], photographs: Iterable[str]) -> Matched[Value]:
    """Restore the leading zeros of ids that a spreadsheet has read as numbers."""
    meanings = find_meanings(rows, photographs)
    claims = defaultdict(list)
    for row, bins in meanings.items():
        for bin_id in bins:
            claims[bin_id].append(row)
    matched: dict[str, Value] = {}
    unclear = {}
    for bin_id, claiming in claims.items():
        meant = meanings[claiming[0]]
        if len(claiming) == len(meant) == 1:
            matched[bin_id] = rows[claiming[0]]
        else:
            unclear[bin_id] = f"{' or '.join(claiming)} could mean {' or '.join(meant)}"
    padded = sum(bin_id not in rows for bin_id in matched)
    return Matched(matched, padded, unclear)


def find_meanings(rows: Collection[str], photographs: Iterable[str]) -> dict[str, list[str]]:
    """The bins that each row's id can mean: only itself if no photograph has more zeros.

    `1` can mean the photograph 00001 unless that has a row of its own. If there is also a
    photograph 1, it means only that one as long as any id of the file still has its zeros.
    """
    same_number = defaultdict(list)
    for bin_id in filter(is_number, photographs):
        same_number[bin_id.lstrip("0")].append(bin_id)
    zeros_kept = any(is_number(row) and re.match("0.", row) for row in rows)

    def meant(row: str) -> list[str]:
        bins = same_number.get(row.lstrip("0"), []) if is_number(row) else []
        if row in bins and zeros_kept:
            return [row]
        return [one for one in bins if one == row or (one.endswith(row) and one not in rows)]

    return {row: meant(row) or [row] for row in rows}


def is_number(bin_id: str) -> bool:
    return bin_id.isascii() and bin_id.isdecimal()
