"""Does a bin hold what its record says? Telling right claims from wrong ones.

The score of a claim is the calibrated probability of the claimed count. A score below the threshold
of its count is an alarm.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import betaincinv

from stages.networks.calibration import Counts, Floats
from stages.runtime.params import Threshold
from stages.scoring.claims import Claims

FALSE_ALARMS = (0.01, 0.05, 0.10)
#: Shares of wrong records for which the precision of alarms is predicted.
PREVALENCES = (0.001, 0.01, 0.05)
_POINTS = 200


class Rates(NamedTuple):
    """The shares of right claims and of wrong claims, by their error, that raise an alarm."""

    false_alarms: float
    found: float
    found_off_by_one: float
    found_off_by_more: float


def choose_thresholds(
    right_scores: Floats,
    columns: Counts,
    labels: int,
    false_alarms: float,
    kind: Threshold,
) -> Floats:
    """The threshold of each label, below which `false_alarms` of the right claims lie.

    `right_scores` are those of the bins' own records, `columns` their positions among the labels. A
    global threshold is the same for all labels. A label without bins has the global one.
    """
    thresholds = np.full(labels, threshold_for(right_scores, false_alarms))
    if kind == "per_count":
        for column in np.unique(columns):
            thresholds[column] = threshold_for(right_scores[columns == column], false_alarms)
    return thresholds


def threshold_for(right_scores: Floats, false_alarms: float) -> float:
    """The highest threshold with at most this share (less than 1) of right claims below it."""
    ordered = np.sort(right_scores)
    # 0.29 * 100 is 28.999999999999996 in floating point.
    below = int(false_alarms * len(ordered) + 1e-6)
    return float(ordered[min(below, len(ordered) - 1)])


def false_alarms_by_chance(validation_bins: int, false_alarms: float) -> tuple[float, float]:
    """The 95% range of the false alarms of other bins, at the threshold_for so many of validation.

    Whatever the scores, the share of all right claims below the j-th lowest of n is distributed as
    Beta(j, n + 1 - j) (David and Nagaraja, Order Statistics, 2003, 2.2). Bins are taken to be
    independent.
    """
    rank = int(false_alarms * validation_bins + 1e-6) + 1
    low, high = betaincinv(rank, validation_bins + 1 - rank, [0.025, 0.975])
    return float(low), float(high)


def rates_at(claims: Claims, thresholds: Floats, weights: Floats) -> Rates:
    """The rates at a threshold per label, with a weight per bin; 0 if there are no such claims."""
    alarms = claims.scores < thresholds[claims.columns]
    of_claim = claims.weights * weights[claims.bins]

    def share(chosen: NDArray[np.bool_]) -> float:
        total = of_claim[chosen].sum()
        return float(of_claim[chosen & alarms].sum() / total) if total else 0.0

    errors = claims.errors
    return Rates(share(errors == 0), share(errors > 0), share(errors == 1), share(errors > 1))


def rates_by_count(claims: Claims, labels: list[int], thresholds: Floats) -> pd.DataFrame:
    """A row per quantity: the shares of right and of wrong records with it that raise an alarm.

    One threshold for all counts hides that wrong records of some counts are hardly ever found. A
    share is missing if there are no such records.
    """
    alarms = claims.scores < thresholds[claims.columns]
    rows = []
    for column, label in enumerate(labels):
        right, wrong = (
            (claims.columns == column) & (claims.right == is_right) for is_right in (True, False)
        )
        rates = [
            np.average(alarms[chosen], weights=claims.weights[chosen]) if chosen.any() else np.nan
            for chosen in (right, wrong)
        ]
        rows.append((label, thresholds[column], int(right.sum()), *rates))
    columns = ["quantity", "threshold", "right_records", "false_alarms", "found"]
    return pd.DataFrame(rows, columns=columns)


def roc_curve(claims: Claims, weights: Floats) -> tuple[Floats, Floats]:
    """The share of false alarms and the share of wrong claims found, at every threshold.

    Above the lowest threshold, a share is NaN if there are no such claims.
    """
    return curve_of(claims.scores, claims.right, claims.weights * weights[claims.bins])


def curve_of(scores: Floats, right: NDArray[np.bool_], weights: Floats) -> tuple[Floats, Floats]:
    """The roc_curve of claims in the order of their scores, lowest first, with these weights."""
    # Claims with equal scores become alarms together.
    last_of_score = np.flatnonzero(np.diff(scores, append=np.inf))
    curves = []
    for chosen in (right, ~right):
        alarms = np.cumsum(np.where(chosen, weights, 0.0))
        shares = alarms[last_of_score] / (alarms[-1] or math.nan)
        curves.append(np.concatenate([[0.0], shares]))
    return curves[0], curves[1]


def roc_metrics(claims: Claims, weights: Floats) -> dict[str, float]:
    """The area under the ROC curve, and the share of wrong claims found at each of FALSE_ALARMS.

    The area is the probability that a wrong claim scores below a right one, and NaN if there are no
    wrong claims.
    """
    return metrics_of(*roc_curve(claims, weights))


def metrics_of(false_alarms: Floats, found: Floats) -> dict[str, float]:
    """The roc_metrics of a curve; all are NaN if it has only right or only wrong claims."""
    if np.isnan(false_alarms[-1] + found[-1]):
        found = np.full_like(found, math.nan)
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


def precision_at(rates: Rates, right_claims: int) -> dict[float, float]:
    """The precision of alarms by PREVALENCES.

    If none of the `right_claims` raised an alarm, the share of false alarms is taken to be its
    upper 95% bound, 3 / right_claims (Hanley and Lippman-Hand, If Nothing Goes Wrong, Is Everything
    All Right?, JAMA 1983).
    """
    false = rates.false_alarms or min(1.0, 3 / right_claims)
    return {share: float(precision(rates.found, false, share)) for share in PREVALENCES}


def roc_table(claims: Claims) -> pd.DataFrame:
    """Points of the ROC curve for a plot, densest where there are few false alarms."""
    false_alarms, found = roc_curve(claims, np.ones(claims.bins.max() + 1))
    grid = np.union1d(np.linspace(0, 1, _POINTS + 1), np.geomspace(1e-4, 1, _POINTS + 1))
    # The first and the last point at each share of the grid, because the curve may rise there.
    lowest, highest = (np.searchsorted(false_alarms, grid, side) for side in ("left", "right"))
    points = np.union1d(lowest, highest - 1)
    return pd.DataFrame({"false_alarms": false_alarms[points], "found": found[points]})
