"""Lists of bins that users provide: CSV files in the folder lists/, with a row per bin."""

import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.csv

from stages.runtime import paths
from stages.runtime.errors import UserError

SHOWN = 5


def read_list(name: str, key: str, columns: Sequence[str]) -> dict[str, list[str]]:
    """Read these columns, "id" among them, of a list.

    `key` is the key of params.yaml that names the file. Raises UserError if the file is missing, or
    is not such a list.
    """
    path = paths.LISTS / name
    strings = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()))
    try:
        table = pyarrow.csv.read_csv(path, convert_options=strings)
    except FileNotFoundError:
        raise UserError(
            f"{key}: there is no file {path}. Put it there; `dvc exp run --queue` and `--temp` need"
            f" `git add {path}` too, since they only have files that git knows"
        ) from None
    except pa.ArrowInvalid as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as a CSV file: {reason}") from None
    for column in columns:
        if table.column_names.count(column) != 1:
            names = reprlib.repr(", ".join(table.column_names))
            raise UserError(f"{path} should have one column {column}; its first line is {names}")
    listed: dict[str, list[str]] = table.select(columns).to_pydict()
    if not listed["id"]:
        raise UserError(f"{path} lists no bins")
    counts = Counter(listed["id"])
    if twice := [bin_id for bin_id, count in counts.items() if count > 1]:
        raise UserError(f"{path} lists {some(twice)} more than once")
    return listed


def refuse_unknown(name: str, ids: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise UserError if the list has an id that is not `known`; `where` says what is known."""
    known = set(known)
    if unknown := [bin_id for bin_id in ids if bin_id not in known]:
        raise UserError(
            f"{paths.LISTS / name} lists {some(unknown)}, which {where} does not have: remove them,"
            " or correct them (an id is text: 00100 and 100 are two bins)"
        )


def some(names: Sequence[str]) -> str:
    """The first of these names, and how many more there are."""
    shown = ", ".join(map(reprlib.repr, names[:SHOWN]))
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
