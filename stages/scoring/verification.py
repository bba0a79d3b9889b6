"""Does a bin hold what its record says? Telling right claims from wrong ones.

For every bin each count is claimed once: its record's, which counts as right, and every other as a
wrong record, so each error is as frequent as the quantities make it. The score of a claim is the
calibrated probability of the claimed count. A score below a threshold is an alarm. Records that are
wrong in the data itself count as right here, which makes every rate look a little worse than it is.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

FALSE_ALARMS = (0.01, 0.05, 0.10)
#: Shares of wrong records for which the precision of alarms is predicted.
PREVALENCES = (0.001, 0.01, 0.05)
_POINTS = 200


@dataclass(frozen=True)
class Claims:
    """Claims in the order of their scores, lowest first, one entry for each.

    `bins` has the positions of their bins, `errors` how many items they are off.
    """

    bins: Counts
    errors: Counts
    scores: Floats

    @property
    def right(self) -> NDArray[np.bool_]:
        right: NDArray[np.bool_] = self.errors == 0
        return right


class Rates(NamedTuple):
    """The shares of right claims and of wrong claims, by their error, that raise an alarm."""

    false_alarms: float
    found: float
    found_off_by_one: float
    found_off_by_more: float


def make_claims(probabilities: Floats, actual: Counts, labels: list[int]) -> Claims:
    """All claims about bins with `probabilities` [bins, labels] and true counts `actual`."""
    bins, columns = (indices.ravel() for indices in np.indices(probabilities.shape))
    errors = np.abs(np.array(labels)[columns] - actual[bins])
    scores = probabilities.ravel().astype(np.float64)
    order = np.argsort(scores, kind="stable")
    return Claims(bins[order], errors[order], scores[order])


def right_probabilities(table: pd.DataFrame) -> Floats:
    """The probability of each row's actual count; `table` has `actual` and p<label> columns."""
    columns = table.columns.get_indexer(pd.Index([f"p{count}" for count in table["actual"]]))
    chosen: Floats = table.to_numpy()[np.arange(len(table)), columns].astype(np.float64)
    return chosen


def threshold_for(right_scores: Floats, false_alarms: float) -> float:
    """The highest threshold with at most this share (less than 1) of right claims below it."""
    ordered = np.sort(right_scores)
    # 0.29 * 100 is 28.999999999999996 in floating point.
    below = int(false_alarms * len(ordered) + 1e-6)
    return float(ordered[min(below, len(ordered) - 1)])


def rates_at(claims: Claims, threshold: float, weights: Floats) -> Rates:
    """The rates at a threshold, with a weight for each bin; 0 if there are no such claims."""
    alarms = claims.scores < threshold
    of_claim = weights[claims.bins]

    def share(chosen: NDArray[np.bool_]) -> float:
        total = of_claim[chosen].sum()
        return float(of_claim[chosen & alarms].sum() / total) if total else 0.0

    errors = claims.errors
    return Rates(share(errors == 0), share(errors > 0), share(errors == 1), share(errors > 1))


def rates_by_count(
    probabilities: Floats, actual: Counts, labels: list[int], threshold: float
) -> pd.DataFrame:
    """A row per quantity: the shares of right and of wrong records with it that raise an alarm.

    One threshold for all counts hides that wrong records of some counts are hardly ever found. The
    share is missing if there are no such records.
    """
    alarms = probabilities < threshold
    rows = []
    for column, label in enumerate(labels):
        right = actual == label
        rates = [
            alarms[chosen, column].mean() if chosen.any() else np.nan for chosen in (right, ~right)
        ]
        rows.append((label, int(right.sum()), *rates))
    return pd.DataFrame(rows, columns=["quantity", "right_records", "false_alarms", "found"])


def roc_curve(claims: Claims, weights: Floats) -> tuple[Floats, Floats]:
    """The share of false alarms and the share of wrong claims found, at every threshold."""
    of_claim = weights[claims.bins]
    # Claims with equal scores become alarms together.
    last_of_score = np.flatnonzero(np.diff(claims.scores, append=np.inf))
    curves = []
    for chosen in (claims.right, ~claims.right):
        alarms = np.cumsum(np.where(chosen, of_claim, 0.0))
        curves.append(np.concatenate([[0.0], alarms[last_of_score] / max(alarms[-1], 1e-12)]))
    return curves[0], curves[1]


def roc_metrics(claims: Claims, weights: Floats) -> dict[str, float]:
    """The area under the ROC curve, and the share of wrong claims found at each of FALSE_ALARMS.

    The area is the probability that a wrong claim scores below a right one.
    """
    false_alarms, found = roc_curve(claims, weights)
    last = np.searchsorted(false_alarms, FALSE_ALARMS, side="right") - 1
    at = zip(FALSE_ALARMS, found[last], strict=True)
    found_at = {f"found_at_{100 * share:.0f}": float(value) for share, value in at}
    return {"auroc": float(np.trapezoid(found, false_alarms))} | found_at


def precision(found: Floats | float, false_alarms: Floats | float, prevalence: float) -> Floats:
    """The share of alarms that are wrong records if a share `prevalence` of records is wrong.

    It follows from Bayes' rule, and is 0 if there are no alarms.
    """
    true_alarms = prevalence * np.asarray(found)
    alarms = true_alarms + (1 - prevalence) * np.asarray(false_alarms)
    return np.divide(true_alarms, alarms, out=np.zeros_like(alarms), where=alarms > 0)


def verification_table(claims: Claims, thresholds: dict[str, float]) -> pd.DataFrame:
    """A row with the rates at each threshold; `thresholds` are given by name."""
    weights = np.ones(claims.bins.max() + 1)
    return pd.DataFrame(
        {"alarms": name, "threshold": threshold} | rates_at(claims, threshold, weights)._asdict()
        for name, threshold in thresholds.items()
    )


def precision_table(verification: pd.DataFrame, right_claims: int) -> pd.DataFrame:
    """The precision of each row's alarms for each of PREVALENCES.

    `bins_per_find` is the number of alarms a person looks at for each wrong record found, `inf` if
    none is found. If none of the `right_claims` raised an alarm, the share of false alarms is taken
    to be its upper 95% bound, 3 / right_claims (Hanley and Lippman-Hand, If Nothing Goes Wrong, Is
    Everything All Right?, JAMA 1983).
    """
    rows = []
    names = ("alarms", "found", "false_alarms")
    for alarms, found, false_alarms in zip(*(verification[name] for name in names), strict=True):
        for prevalence in PREVALENCES:
            false = false_alarms or min(1.0, 3 / right_claims)
            share = float(precision(found, false, prevalence))
            rows.append((alarms, prevalence, found, share, 1 / share if share else np.inf))
    columns = ["alarms", "wrong_records", "found", "precision", "bins_per_find"]
    return pd.DataFrame(rows, columns=columns)


def roc_table(claims: Claims) -> pd.DataFrame:
    """Points of the ROC curve for a plot, densest where there are few false alarms."""
    false_alarms, found = roc_curve(claims, np.ones(claims.bins.max() + 1))
    grid = np.union1d(np.linspace(0, 1, _POINTS + 1), np.geomspace(1e-4, 1, _POINTS + 1))
    # The first and the last point at each share of the grid, because the curve may rise there.
    lowest, highest = (np.searchsorted(false_alarms, grid, side) for side in ("left", "right"))
    points = np.union1d(lowest, highest - 1)
    return pd.DataFrame({"false_alarms": false_alarms[points], "found": found[points]})
