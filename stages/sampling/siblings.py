"""Sibling bins: photographs of one bin before and after a pick, which have consecutive ids."""

import re
from collections.abc import Sequence

import pandas as pd


def padded_number(bin_id: str) -> int | None:
    """The number of a zero-padded id (00001 to 99999, 100000 and up); None for any other.

    Un-padded ids (1 to 1200) are other bins than their padded twins, and have no sequence. Some are
    nevertheless siblings of padded bins (1057 of 04131 and 04132, by their ASINs), but no rule
    finds them, since distant bins often share an ASIN, and sometimes two. Each un-padded id is a
    group of its own, so up to 1,200 of the bucket's 536,434 bins may have a sibling in another set.
    """
    if re.fullmatch(r"\d{5}|[1-9]\d{5,17}", bin_id, re.ASCII) is None:
        return None
    return int(bin_id)


def sibling_groups(ids: Sequence[str], contents: pd.DataFrame) -> list[str]:
    """For each bin, the id of the first bin in its group.

    `contents` has a row per item: `bin`, the position of its bin in `ids`, and `asin`. Two bins
    are siblings if their padded ids are consecutive and they share an ASIN. Siblings of siblings
    belong to one group.
    """
    numbers = pd.Series([padded_number(bin_id) for bin_id in ids], dtype="Int64")
    bins = pd.DataFrame({"id": ids, "number": numbers})
    padded = bins.dropna(subset="number").sort_values("number")
    held = pd.DataFrame({"number": numbers[contents["bin"]].array, "asin": contents["asin"]})
    held = held.dropna().drop_duplicates()
    next_ones = held.assign(number=held["number"] + 1)
    after_sibling = held.merge(next_ones, on=["number", "asin"])["number"]
    starts_group = ~padded["number"].isin(after_sibling)
    first_ids = padded["id"].where(starts_group).ffill()
    return first_ids.reindex(bins.index).fillna(bins["id"]).tolist()
