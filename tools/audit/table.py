"""The table of an audit: how suspicious each bin is."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stages.networks.calibration import Floats, probability_columns
from stages.runtime.counts import AndMore
from tools.audit.expected import NO_COUNT, Expected
from tools.audit.items import ItemsJudge

NO_PHOTOGRAPH = "photograph missing"


def audit_table(
    scored: pd.DataFrame,
    expected: Expected,
    labels: Sequence[int],
    thresholds: Floats,
    judge: ItemsJudge | None = None,
) -> pd.DataFrame:
    """A row for each bin with a photograph or an expected count, the most suspicious first.

    A record's score is the probability of its count. A score below the threshold of that count is
    an alarm; suspicion is 1 - score. Bins that cannot be judged come last, by id, with a reason
    instead of suspicion and alarm. `scored` has the columns id, p<label> for each label, and
    problem; `thresholds` are in the order of `labels`.

    With a `judge`, the score is multiplied by the probability that the record's items are those of
    the bin, a column `items`. Each alarm then has a reason too. `scored` also has the columns of
    expected_columns.
    """
    columns = probability_columns(list(labels))
    bins = scored.merge(expected_table(expected), on="id", how="outer")
    probabilities = bins[columns].to_numpy(np.float64)
    positions = label_positions(bins["expected"], labels)
    most_probable = np.nan_to_num(probabilities).argmax(axis=1)
    seen = pd.Series(np.array(labels)[most_probable], bins.index, dtype="Int64")
    bins["seen"] = seen.where(bins[columns[0]].notna())
    has_label = positions >= 0
    score = np.where(has_label, probabilities[np.arange(len(bins)), positions], np.nan)
    if judge is not None:
        names = np.array([str(label) for label in labels])
        bins["label"], bins["looks_like"] = names[positions], names[most_probable]
        bins["counted"] = score
        bins = bins.join(judge.judge(bins, expected.numbers, positions))
        score = score * bins["items"].fillna(1.0).to_numpy()
    bins["suspicion"] = 1 - score
    alarm = score < np.where(has_label, thresholds[positions], np.nan)
    bins["alarm"] = np.where(np.isnan(score), "", np.where(alarm, "yes", "no"))
    bins["reason"] = reasons(bins, np.isnan(score), labels)
    if judge is not None:
        bins.loc[alarm, "reason"] = judge.reasons(bins[alarm])
    # By score, since rounding makes 1 - score the same for many tiny scores.
    order = bins.assign(score=score).sort_values(["score", "id"]).index
    of_items = ["items"] if judge else []
    shown = ["id", "expected", "seen", "suspicion", "alarm", *columns, *of_items, "reason"]
    return bins.loc[order, shown].reset_index(drop=True)


def label_positions(counts: "pd.Series[int]", labels: Sequence[int]) -> NDArray[np.int64]:
    """The position of each count's label, -1 for a count that has none or is missing."""
    positions = np.full(len(counts), -1)
    for position, label in enumerate(labels):
        of_label = counts.ge(label) if isinstance(label, AndMore) else counts.eq(label)
        positions[of_label.fillna(value=False).to_numpy(dtype=bool)] = position
    return positions


def expected_table(expected: Expected) -> pd.DataFrame:
    """The columns id, expected (null if there is a problem) and record_problem."""
    counts = [*expected.counts.values(), *(None for _ in expected.problems)]
    return pd.DataFrame(
        {
            "id": pd.Series([*expected.counts, *expected.problems], dtype="str"),
            "expected": pd.array(counts, "Int64"),
            "record_problem": [*("" for _ in expected.counts), *expected.problems.values()],
        }
    )


def reasons(bins: pd.DataFrame, unjudged: NDArray[np.bool_], labels: Sequence[int]) -> pd.Series:
    """Why each bin could not be judged, or ""."""
    only = f"the models count only {describe_labels(labels)} items"
    reason = pd.Series(np.where(unjudged, only, ""), bins.index, dtype="str")
    reason = reason.mask(bins["expected"].isna(), NO_COUNT)
    reason = reason.mask(bins["record_problem"].fillna("") != "", bins["record_problem"])
    reason = reason.mask(bins["problem"].fillna("") != "", bins["problem"])
    return reason.mask(bins["problem"].isna(), NO_PHOTOGRAPH)


def describe_labels(labels: Sequence[int]) -> str:
    """Like "1 to 5", "0, 2, 7" or "0 to 6+"."""
    ordered = sorted(labels)
    if ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))
