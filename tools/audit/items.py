"""The items of a record against the photograph: what the witness in models/witness says."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stages.networks.calibration import Floats
from stages.scoring.witness import NUMBERS, Witness

_LIKE = "the items of the record look {} for what is in the bin"
# What a number of a record means that is too high, and too low.
_WORDS = {
    "volume": (_LIKE.format("too large in all"), _LIKE.format("too small in all")),
    "largest_volume": (_LIKE.format("too large"), _LIKE.format("too small")),
    "smallest_volume": (_LIKE.format("too large"), _LIKE.format("too small")),
    "weight": (_LIKE.format("too heavy in all"), _LIKE.format("too light in all")),
    "largest_weight": (_LIKE.format("too heavy"), _LIKE.format("too light")),
    "smallest_weight": (_LIKE.format("too heavy"), _LIKE.format("too light")),
    "longest_side": (_LIKE.format("too long"), _LIKE.format("too short")),
    "products": (
        "the record lists more products than seem to be in the bin",
        "the record lists fewer products than seem to be in the bin",
    ),
}


@dataclass(frozen=True)
class ItemsJudge:
    """A witness, and how usual its answers are.

    `right_counts` and `right_items` are the probabilities of the counts, and those that the items
    are the bin's, for the right records of validation.
    """

    witness: Witness
    right_counts: Floats
    right_items: Floats

    def judge(
        self, bins: pd.DataFrame, numbers: Mapping[str, Floats], labels: "pd.Series[int]"
    ) -> pd.DataFrame:
        """The columns `items`, the probability that these are the bin's, and `doubt`, in words.

        `bins` has the columns id and those of expected_columns, `numbers` those of each record by
        id, and `labels` the position of each record's count. Both are missing for a bin without
        one of them.
        """
        found = pd.DataFrame({"items": np.nan, "doubt": ""}, bins.index)
        known = (
            bins[expected_columns()[0]].notna() & bins["id"].isin(numbers.keys()) & (labels >= 0)
        )
        if not known.any():
            return found
        expected = bins.loc[known, expected_columns()].to_numpy(np.float64)
        of_records = np.stack([numbers[bin_id] for bin_id in bins.loc[known, "id"]])
        deviations = self.witness.deviations(of_records, np.asarray(labels[known], np.int64))
        evidence = self.witness.evidence(expected, deviations)
        found.loc[known, "items"] = self.witness.belief(evidence)
        doubts = zip(*self.witness.strongest_doubts(expected, deviations), strict=True)
        found.loc[known, "doubt"] = [
            _WORDS[NUMBERS[number]][0 if above else 1] for number, above in doubts
        ]
        return found

    def reasons(
        self, bins: pd.DataFrame, counted: "pd.Series[float]", judged: pd.DataFrame
    ) -> "pd.Series[str]":
        """Why each bin would be flagged: what is less usual among right records, count or items.

        `counted` is the probability of the record's count, and `judged` what judge returned.
        """
        by_count = usual(self.right_counts, np.asarray(counted, np.float64))
        by_items = usual(self.right_items, np.asarray(judged["items"].fillna(1.0), np.float64))
        same = (bins["seen"] == bins["expected"]).fillna(value=False).to_numpy(dtype=bool)
        looks = [
            f"the photograph looks like {number_of_items(seen)}, the record says {expected}"
            for seen, expected in zip(bins["seen"], bins["expected"], strict=True)
        ]
        reasons: list[str] = np.where((by_items < by_count) | same, judged["doubt"], looks).tolist()
        return pd.Series(reasons, bins.index, dtype="str")


def usual(right: Floats, values: Floats) -> Floats:
    """The share of right records that score below each value."""
    below: Floats = np.searchsorted(np.sort(right), values) / len(right)
    return below


def number_of_items(count: int) -> str:
    return "1 item" if count == 1 else f"{count} items"


def expected_columns() -> list[str]:
    """The columns with the deviations that a photograph lets one expect."""
    return [f"expected_{name}" for name in NUMBERS]
