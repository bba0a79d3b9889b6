"""Sibling bins: photographs of one bin before and after a pick, which have consecutive ids."""

import re
from collections.abc import Sequence

import pandas as pd


def padded_number(bin_id: str) -> int | None:
    """The number of a zero-padded id (00001 to 99999, 100000 and up); None for any other.

    Un-padded ids (1 to 1200) are other bins than their padded twins, and have no sequence. Each is
    a group of its own, although some are siblings of padded bins (1057 of 04131 and 04132, by their
    ASINs): no rule finds them, since distant bins often share an ASIN, and sometimes two.
    """
    if re.fullmatch(r"\d{5}|[1-9]\d{5,17}", bin_id, re.ASCII) is None:
        return None
    return int(bin_id)


def unpadded_twins(ids: Sequence[str]) -> set[str]:
    """The ids that are another id without its leading zeros, like 1 beside 00001."""
    known = set(ids)
    return {one for one in known if one.zfill(5) != one and one.zfill(5) in known}


def sibling_groups(
    ids: Sequence[str], contents: pd.DataFrame, empty: Sequence[str] = ()
) -> list[str]:
    """For each bin, the id of the first bin in its group.

    `contents` has a row per item: `bin`, the position of its bin in `ids`, and `asin`. Two bins
    are siblings if their padded ids are consecutive and they share an ASIN. Siblings of siblings
    belong to one group. Bins that are `empty` hold no ASIN, so they join both of their neighbours.
    """
    numbers = pd.Series([padded_number(bin_id) for bin_id in ids], dtype="Int64")
    bins = pd.DataFrame({"id": ids, "number": numbers})
    padded = bins.dropna(subset="number").sort_values("number")
    held = pd.DataFrame({"number": numbers[contents["bin"]].array, "asin": contents["asin"]})
    held = held.dropna().drop_duplicates()
    next_ones = held.assign(number=held["number"] + 1)
    after_sibling = held.merge(next_ones, on=["number", "asin"])["number"]
    is_empty = padded["id"].isin(empty)
    # The row before is the neighbour only if no id is missing between the two.
    is_next = padded["number"].diff().eq(1)
    joins_empty = is_next & (is_empty | is_empty.shift(fill_value=False))
    starts_group = ~(padded["number"].isin(after_sibling) | joins_empty)
    first_ids = padded["id"].where(starts_group).ffill()
    return first_ids.reindex(bins.index).fillna(bins["id"]).tolist()
