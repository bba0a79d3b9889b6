"""The table of an audit: how suspicious each bin is."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from stages.networks.calibration import Floats, probability_columns
from stages.runtime.counts import AndMore
from tools.audit.expected import NO_COUNT, Expected
from tools.audit.items import ItemsJudge


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
    score, threshold = pd.Series(np.nan, bins.index), pd.Series(np.nan, bins.index)
    position = pd.Series(-1, bins.index)
    for number, (label, column) in enumerate(zip(labels, columns, strict=True)):
        counts = bins["expected"]
        has_label = (counts.ge(label) if isinstance(label, AndMore) else counts.eq(label)).fillna(
            value=False
        )
        score = score.mask(has_label, bins[column])
        threshold = threshold.mask(has_label, thresholds[number])
        position = position.mask(has_label, number)
    most_probable = np.array(labels)[bins[columns].fillna(0.0).to_numpy().argmax(axis=1)]
    seen = pd.Series(most_probable, bins.index, dtype="Int64").where(bins[columns[0]].notna())
    bins["seen"] = seen
    counted = score
    if judge is not None:
        judged = judge.judge(bins, expected.numbers, position)
        bins["items"] = judged["items"]
        score = counted * judged["items"].fillna(1.0)
    bins["suspicion"] = 1 - score
    bins["alarm"] = np.where(score.isna(), "", np.where(score < threshold, "yes", "no"))
    bins["reason"] = reasons(bins, score.isna(), labels)
    if judge is not None:
        alarm = bins["alarm"] == "yes"
        bins["reason"] = bins["reason"].mask(alarm, judge.reasons(bins, counted, judged))
    # By score, since rounding makes 1 - score the same for many tiny scores.
    order = bins.assign(score=score).sort_values(["score", "id"]).index
    shown = [*columns, *(["items"] if judge else [])]
    names = ["id", "expected", "seen", "suspicion", "alarm", *shown, "reason"]
    return bins.loc[order, names].reset_index(drop=True)


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


def reasons(bins: pd.DataFrame, unjudged: pd.Series, labels: Sequence[int]) -> pd.Series:
    """Why each bin could not be judged, or ""."""
    only = f"the models count only {describe_labels(labels)} items"
    reason = pd.Series(np.where(unjudged, only, ""), bins.index, dtype="str")
    reason = reason.mask(bins["expected"].isna(), NO_COUNT)
    reason = reason.mask(bins["record_problem"].fillna("") != "", bins["record_problem"])
    reason = reason.mask(bins["problem"].fillna("") != "", bins["problem"])
    return reason.mask(bins["problem"].isna(), "photograph missing")


def describe_labels(labels: Sequence[int]) -> str:
    """Like "1 to 5", "0, 2, 7" or "0 to 6+"."""
    ordered = sorted(labels)
    if ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))
