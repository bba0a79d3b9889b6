"""The items of a record against the photograph: what the witness in models/witness says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stages.networks.calibration import Counts, Floats
from stages.scoring.witness import NUMBERS, Witness

_EACH = "the items of the record look too {} for what is in the bin"
_TOGETHER = "the items of the record together look too {} for what is in the bin"
# What a number of a record means that is too high, and too low.
_WORDS = {
    "volume": (_TOGETHER.format("large"), _TOGETHER.format("small")),
    "largest_volume": (_EACH.format("large"), _EACH.format("small")),
    "smallest_volume": (_EACH.format("large"), _EACH.format("small")),
    "weight": (_TOGETHER.format("heavy"), _TOGETHER.format("light")),
    "largest_weight": (_EACH.format("heavy"), _EACH.format("light")),
    "smallest_weight": (_EACH.format("heavy"), _EACH.format("light")),
    "longest_side": (_EACH.format("long"), _EACH.format("short")),
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
        self, bins: pd.DataFrame, numbers: Mapping[str, Floats], positions: Counts
    ) -> pd.DataFrame:
        """The columns `items`, the probability that these are the bin's, and `doubt`, in words.

        `bins` has the columns id and those of expected_columns, `numbers` those of each record by
        id, and `positions` the position of each record's label, or -1. Both columns are empty for a
        bin that lacks one of these.
        """
        found = pd.DataFrame({"items": np.nan, "doubt": ""}, bins.index)
        known = bins[expected_columns()[0]].notna() & bins["id"].isin(numbers.keys())
        known &= positions >= 0
        if not known.any():
            return found
        expected = bins.loc[known, expected_columns()].to_numpy(np.float64)
        of_records = np.stack([numbers[bin_id] for bin_id in bins.loc[known, "id"]])
        deviations = self.witness.deviations(of_records, positions[known.to_numpy()])
        evidence = self.witness.evidence(expected, deviations)
        found.loc[known, "items"] = self.witness.belief(evidence)
        doubts = zip(*self.witness.strongest_doubts(expected, deviations), strict=True)
        found.loc[known, "doubt"] = [
            _WORDS[NUMBERS[number]][0 if above else 1] for number, above in doubts
        ]
        return found

    def reasons(self, alarms: pd.DataFrame) -> list[str]:
        """Why bins are flagged: what is less usual among right records, their count or their items.

        `alarms` has the columns that judge returns, expected, label (that of the record),
        looks_like (the most probable label), and counted (the probability of the record's label).
        """
        by_count = usual(self.right_counts, alarms["counted"].to_numpy(np.float64))
        by_items = usual(self.right_items, alarms["items"].to_numpy(np.float64))
        return [
            alarm["doubt"] if about_items else count_reason(alarm)
            for alarm, about_items in zip(
                alarms.to_dict("records"), by_items < by_count, strict=True
            )
        ]


def usual(right: Floats, values: Floats) -> Floats:
    """The share of right records that score at most as high as each value."""
    shares: Floats = np.searchsorted(np.sort(right), values, side="right") / len(right)
    return shares


def count_reason(alarm: Mapping[Any, Any]) -> str:
    looks_like, expected = alarm["looks_like"], alarm["expected"]
    if alarm["label"] == looks_like:
        return (
            f"the photograph hardly looks more like the record's {expected} than like other counts"
        )
    items = "1 item" if looks_like == "1" else f"{looks_like} items"
    return f"the photograph looks like {items}, the record says {expected}"


def expected_columns() -> list[str]:
    """The columns with the deviations that a photograph lets one expect."""
    return [f"expected_{name}" for name in NUMBERS]
