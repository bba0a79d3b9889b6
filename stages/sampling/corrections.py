"""Counts that people corrected: a list of decisions, as the page of an audit saves it."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from stages.runtime import paths
from stages.runtime.counts import open_label
from stages.runtime.errors import UserError
from stages.sampling.lists import read_list, some

_COLUMNS = ("id", "expected", "counted", "decision")
_DECISIONS = ("right", "wrong", "other_items", "unclear")


class Corrected(NamedTuple):
    """Bins with corrected counts in `quantity`, and the records' in `recorded`.

    `left_out` are those that nobody could tell, or whose counts are not among the classes.
    """

    bins: pd.DataFrame
    left_out: set[str]
    summary: str


def correct(bins: pd.DataFrame, name: str, classes: list[int]) -> Corrected:
    """Apply the decisions of the file lists/`name` to bins of data/subset.parquet.

    `bins` has id and quantity. A decision about a bin that it does not have, or about a record that
    has changed since, is not applied. Raises UserError if a row is not a decision.
    """
    decisions = read_decisions(name, classes)
    recorded = bins["quantity"]
    unknown, changed = not_applicable(decisions, dict(zip(bins["id"], recorded, strict=True)))
    applied = decisions[~decisions["id"].isin([*unknown, *changed])].set_index("id")
    counted = bins["id"].map(applied["counted"].dropna())
    quantity = counted.fillna(recorded).astype(recorded.dtype)
    unclear = set(applied.index[applied["decision"] == "unclear"])
    others = set(bins.loc[~quantity.isin(classes), "id"])
    corrected = (quantity != recorded) & quantity.isin(classes)
    parts = [
        f"{corrected.sum()} corrected",
        f"{len(unclear)} left out (nobody could tell)",
        *([f"{len(others)} left out (not in subset.quantities)"] if others else []),
        *([f"not applied (their records have changed): {some(changed)}"] if changed else []),
        *([f"not applied (not in {paths.SUBSET}): {some(unknown)}"] if unknown else []),
    ]
    return Corrected(
        bins.assign(quantity=quantity, recorded=recorded),
        unclear | others,
        f"{paths.LISTS / name}: {', '.join(parts)}",
    )


def not_applicable(
    decisions: pd.DataFrame, recorded: Mapping[str, int]
) -> tuple[list[str], list[str]]:
    """The bins of decisions that have no record, and those whose record is another one now."""
    expected = dict(zip(decisions["id"], decisions["expected"], strict=True))
    unknown = [bin_id for bin_id in expected if bin_id not in recorded]
    changed = [one for one, count in expected.items() if recorded.get(one, count) != count]
    return unknown, changed


def read_decisions(name: str, classes: list[int]) -> pd.DataFrame:
    """The columns id, expected, counted (missing if unclear) and decision.

    Counts that belong to an open class, like 6+, become that of its name, as in the subset.
    """
    columns = read_list(name, "split.corrections", _COLUMNS)
    for row in zip(*(columns[column] for column in _COLUMNS), strict=True):
        refuse_other_rows(name, *row)
    table = pd.DataFrame(columns)
    table["expected"] = table["expected"].astype("int64")
    table["counted"] = pd.to_numeric(table["counted"]).astype("Int64")
    if (highest := open_label(classes)) is not None:
        table[["expected", "counted"]] = table[["expected", "counted"]].clip(upper=highest)
    return table


def refuse_other_rows(name: str, bin_id: str, expected: str, counted: str, decision: str) -> None:
    """Raise UserError if the cells of a row do not make a decision."""
    whole = re.compile("[0-9]{1,9}", re.ASCII)
    makes_sense = whole.fullmatch(expected) and {
        "right": counted == expected,
        "other_items": counted == expected,
        "wrong": counted != expected and whole.fullmatch(counted),
        "unclear": counted == "",
    }.get(decision)
    if not makes_sense:
        raise UserError(
            f"{paths.LISTS / name}: the row of {bin_id!r:.70} is not a decision: expected and"
            f" counted should be whole numbers, and decision one of {', '.join(_DECISIONS)}; put"
            " the file there as the page of the audit saved it"
        )
