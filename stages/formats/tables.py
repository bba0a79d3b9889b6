"""CSV and JSON files; the same values give the same bytes."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from stages.runtime.files import write_text


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Path, table: pd.DataFrame, digits: int = 6) -> None:
    """Six significant digits are enough for shares and losses, and equal on all machines."""
    write_text(path, table.to_csv(index=False, lineterminator="\n", float_format=f"%.{digits}g"))


def read_csv(path: Path, *, empty_is_missing: bool = False) -> pd.DataFrame:
    """Read a table of write_csv. Ids and groups are strings, because 00100 is not 100.

    Empty cells are empty texts, or with `empty_is_missing` missing values.
    """
    missing = [""] if empty_is_missing else None
    types = {"id": str, "group": str}
    return pd.read_csv(path, dtype=types, keep_default_na=False, na_values=missing)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))
