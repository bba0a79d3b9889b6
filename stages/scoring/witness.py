"""Do the items of a record fit the photograph? A linear Gaussian model of eight numbers.

The numbers y of a record deviate by d from their mean over the records of train with the same
count. A photograph with the features x lets one expect the deviation m(x), a linear function that
least squares fit. Around it, the deviations of right records are distributed as N(m(x), S), and
those of any records with that count as N(0, T): multivariate linear regression (Anderson, An
Introduction to Multivariate Statistical Analysis, 2003, chapter 8). The evidence for a record is

    log N(d; m(x), S) - log N(d; 0, T)
        = (d' T^-1 d - (d - m)' S^-1 (d - m) + log det S^-1 - log det T^-1) / 2,

the logarithm of a likelihood ratio: its weight of evidence, in nats (Good, Probability and the
Weighing of Evidence, 1950). It compares records with equal counts only, so it says nothing about
the count.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit

from stages.networks.calibration import Counts, Floats

#: What record_numbers computes, in this order. All but the last are logarithms.
NUMBERS = (
    "volume",
    "largest_volume",
    "smallest_volume",
    "weight",
    "largest_weight",
    "smallest_weight",
    "longest_side",
    "products",
)
#: In train, this share of records lies below and above the limits of each number. Numbers beyond
#: them are moved there, so that a slip like inches for millimeters cannot decide everything.
TAIL = 0.01
#: Inches or pounds. What is shorter, lighter, longer or heavier is no item in a bin.
SMALLEST, LARGEST = 1e-6, 1e6
# The covariances are averaged with unit variances that count as much as so many records, so they
# can be inverted however few there are: the mean under an inverse Wishart prior.
_PRIOR_RECORDS = len(NUMBERS)
_MOST_WEIGHT = 2.0


@dataclass(frozen=True)
class Witness:
    """What fit_witness and fit_weight have learned; every array is float64.

    `usual`, `lowest` and `highest` [numbers] replace missing numbers and limit the others. `means`
    [labels, numbers] are those of the records of each label, and `scale` [numbers] their standard
    deviation, in which deviations are measured. `slopes` [features, numbers] and `offset` [numbers]
    give the expected deviation, and `precision` and `prior_precision` [numbers, numbers] are S^-1
    and T^-1. `weight` is what the evidence counts in log-odds, 1 if the model held exactly.
    """

    usual: Floats
    lowest: Floats
    highest: Floats
    means: Floats
    scale: Floats
    slopes: Floats
    offset: Floats
    precision: Floats
    prior_precision: Floats
    weight: float = 1.0

    def expected(self, features: NDArray[np.floating]) -> Floats:
        """The deviations that photographs let one expect, [bins, numbers]."""
        expected: Floats = features.astype(np.float64) @ self.slopes + self.offset
        return expected

    def deviations(self, numbers: Floats, columns: Counts) -> Floats:
        """How far records are from the mean of their label, [records, numbers].

        `numbers` are those of record_numbers, and `columns` the positions of the labels.
        """
        known = np.where(np.isnan(numbers), self.usual, numbers)
        limited = np.clip(known, self.lowest, self.highest)
        deviations: Floats = (limited - self.means[columns]) / self.scale
        return deviations

    def evidence(self, expected: Floats, deviations: Floats) -> Floats:
        """The evidence for one record about each photograph in nats, [bins]."""
        squares = squared_distances(deviations, self.prior_precision)
        squares -= squared_distances(deviations - expected, self.precision)
        _, log_determinant = np.linalg.slogdet(self.precision)
        _, prior_log_determinant = np.linalg.slogdet(self.prior_precision)
        evidence: Floats = (squares + log_determinant - prior_log_determinant) / 2
        return evidence

    def belief(self, evidence: Floats) -> Floats:
        """The probability that the items are those of the bin, if half of all records are wrong.

        A wrong record here is that of another bin with the same count.
        """
        belief: Floats = expit(self.weight * evidence)
        return belief

    def usualness(self, deviations: Floats) -> Floats:
        """The logarithm of a record's density among records with its count, up to a constant."""
        return -squared_distances(deviations, self.prior_precision) / 2

    def strongest_doubts(
        self, expected: Floats, deviations: Floats
    ) -> tuple[Counts, NDArray[np.bool_]]:
        """The number that speaks most against each record (its position), and if it is too high.

        That is the number with the least evidence of its own. It is too high if it lies above what
        the photograph lets one expect.
        """
        variance, prior = (
            np.diag(np.linalg.inv(one)) for one in (self.precision, self.prior_precision)
        )
        above = deviations - expected
        alone = (deviations**2 / prior - above**2 / variance - np.log(variance / prior)) / 2
        least = alone.argmin(axis=1)
        return least, above[np.arange(len(above)), least] > 0


def record_numbers(items: Sequence[Mapping[str, Any]]) -> Floats:
    """The NUMBERS of a record with these items, as parse_record returns them.

    The sum, largest and smallest value of the items' volumes (cubic inches) and weights (pounds),
    the longest side (inches), each as its natural logarithm, and how many products there are. Sides
    and weights that are missing, absurd or in another unit are left out; a number is NaN if nothing
    is left.
    """
    volumes, weights, sides = [], [], []
    for item in items:
        copies = max(1, item["quantity"] or 1)
        three = [measure(item[side], "IN") for side in ("height", "length", "width")]
        volumes.append((copies, math.prod(three)))
        weights.append((copies, measure(item["weight"], "pounds")))
        sides += [side for side in three if not math.isnan(side)]
    numbers = [*spread(volumes), *spread(weights), max(sides, default=math.nan)]
    return np.array([*map(math.log, numbers), float(len(items))])


def measure(value: Mapping[str, Any] | None, unit: str) -> float:
    """A positive length or weight; NaN if it is missing, absurd or in another unit."""
    number = None if value is None or value["unit"] != unit else value["value"]
    return number if number is not None and SMALLEST <= number <= LARGEST else math.nan


def spread(values: Sequence[tuple[int, float]]) -> tuple[float, float, float]:
    """The sum over all copies, the largest and the smallest of the known values."""
    known = [(copies, value) for copies, value in values if not math.isnan(value)]
    if not known:
        return math.nan, math.nan, math.nan
    total = sum(copies * value for copies, value in known)
    return total, max(value for _, value in known), min(value for _, value in known)


def fit_witness(components: Floats, numbers: Floats, columns: Counts, labels: int) -> Witness:
    """Fit on right records, with `components` [bins, components] for features.

    `numbers` [bins, numbers] are those of the records, and `columns` [bins] the positions of their
    counts among so many labels.
    """
    usual = np.array([middle(values) for values in numbers.T])
    known = np.where(np.isnan(numbers), usual, numbers)
    lowest, highest = np.quantile(known, [TAIL, 1 - TAIL], axis=0)
    limited = np.clip(known, lowest, highest)
    means = means_by_label(limited, columns, labels)
    deviations = limited - means[columns]
    scale = deviations.std(axis=0)
    scale[scale == 0] = 1
    deviations /= scale
    ones = np.ones((len(components), 1))
    inputs = np.hstack([components.astype(np.float64), ones])
    solution = np.linalg.lstsq(inputs, deviations, rcond=None)[0].astype(np.float64)
    return Witness(
        usual=usual,
        lowest=lowest,
        highest=highest,
        means=means,
        scale=scale,
        slopes=solution[:-1],
        offset=solution[-1],
        # A regression fits as many bins exactly as it has coefficients.
        precision=precision_of(deviations - inputs @ solution, inputs.shape[1]),
        prior_precision=precision_of(deviations, min(labels, len(deviations) - 1)),
    )


def middle(values: Floats) -> float:
    """The median of the known values, 0 if there are none."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else 0.0


def means_by_label(numbers: Floats, columns: Counts, labels: int) -> Floats:
    """The mean of each label's records; of all records for a label that has none."""
    means: Floats = np.tile(numbers.mean(axis=0), (labels, 1))
    for column in np.unique(columns):
        means[column] = numbers[columns == column].mean(axis=0)
    return means


def precision_of(residuals: Floats, coefficients: int) -> Floats:
    """The inverse covariance of residuals [bins, numbers] that so many coefficients have fitted."""
    freedom = max(len(residuals) - coefficients, 1)
    total = residuals.T @ residuals + _PRIOR_RECORDS * np.eye(residuals.shape[1])
    inverse = np.linalg.inv(total / (freedom + _PRIOR_RECORDS))
    return inverse.astype(np.float64)


def squared_distances(rows: Floats, precision: Floats) -> Floats:
    """Each row's squared Mahalanobis distance from 0."""
    squares: Floats = np.einsum("ij,jk,ik->i", rows, precision, rows)
    return squares


def fit_weight(right: Floats, wrong: Floats) -> float:
    """The weight of evidence that makes it log-odds of right against wrong records, equally many.

    A logistic regression with a single coefficient and no intercept, on the evidence for `right`
    and for `wrong` records of bins that the witness was not fitted on. It is 0 if there are none,
    since evidence that cannot be checked is not to be trusted.
    """
    if not len(right):
        return 0.0

    def loss(weight: float) -> float:
        return float(-log_expit(weight * right).mean() - log_expit(-weight * wrong).mean())

    return float(minimize_scalar(loss, bounds=(0, _MOST_WEIGHT), method="bounded").x)
