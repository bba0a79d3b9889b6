"""How good predicted counts are, and how far their confidence can be trusted.

Every bin has a weight, by default 1. It says how often a sample of the bootstrap has the bin.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stages.networks.calibration import Counts, Floats, negative_log_likelihood, positions_of
from stages.runtime.counts import open_label

CONFIDENCE_INTERVALS = 10


def confusion_matrix(
    actual: Counts, predicted: Counts, labels: list[int], weights: Floats | None = None
) -> Floats:
    """The number of bins, [actual, predicted], in the order of `labels`."""
    rows, columns = (positions_of(counts, labels) for counts in (actual, predicted))
    size = len(labels)
    cells = np.bincount(rows * size + columns, weights, minlength=size**2)
    return cells.reshape(size, size).astype(np.float64)


def counting_metrics(
    actual: Counts, predicted: Counts, labels: list[int], weights: Floats | None = None
) -> dict[str, float]:
    """How far predicted counts are from the records' counts.

    RMSE and MAE are in items; accuracy and within_one are shares of 1. RMSE, MAE and within_one
    leave out records of an open label, like 6+, which do not say a count, and are NaN if there are
    no others; a prediction of it counts as the lowest. macro_f1 is the mean F1 over the labels that
    occur; F1 is 0 for a label that is never predicted correctly. kappa is Cohen's with quadratic
    weights (Psychological Bulletin 1968): 1 is perfect, and 0 is as good as chance. It is also 0 if
    all records and predictions have the same count.
    """
    weights = np.ones(len(actual)) if weights is None else weights
    known = closed_weights(actual, labels, weights)
    error = np.abs(predicted - actual)
    confusion = confusion_matrix(actual, predicted, labels, weights)
    recall, precision = recall_and_precision(confusion)
    total = recall + precision
    f1 = np.divide(2 * recall * precision, total, out=np.zeros_like(total), where=total > 0)
    occurs = confusion.sum(axis=0) + confusion.sum(axis=1) > 0
    return {
        "accuracy": float(np.average(error == 0, weights=weights)),
        "rmse": mean_of_known(error**2, known) ** 0.5,
        "mae": mean_of_known(error, known),
        "within_one": mean_of_known(error <= 1, known),
        "macro_f1": float(f1[occurs].mean()),
        "kappa": _quadratic_kappa(confusion, labels),
    }


def closed_weights(actual: Counts, labels: list[int], weights: Floats) -> Floats:
    """The weights of the bins, 0 if a bin's record is of an open label."""
    return np.where(actual == open_label(labels), 0.0, weights)


def mean_of_known(values: NDArray[Any], known: Floats) -> float:
    """The mean with weights of closed_weights; NaN if they leave out all bins."""
    return float(np.average(values, weights=known)) if known.any() else math.nan


def _quadratic_kappa(confusion: Floats, labels: list[int]) -> float:
    distance = np.subtract.outer(labels, labels) ** 2
    by_chance = np.outer(confusion.sum(axis=1), confusion.sum(axis=0)) / confusion.sum()
    expected = (distance * by_chance).sum()
    return float(1 - (distance * confusion).sum() / expected) if expected else 0.0


def probability_metrics(
    actual: Counts, probabilities: Floats, labels: list[int], weights: Floats | None = None
) -> dict[str, float]:
    """How good `probabilities` [bins, labels] are.

    rmse_of_mean is the RMSE of the distribution's expected count, which need not be whole, and
    mae_of_median the mean absolute error of its median, in items: the mean has the least squared
    error, the median the least absolute one, and the most probable count the most hits. rps is the
    mean of ranked_probability_scores, in items; nll is the negative log-likelihood in nats;
    calibration_error is the root of squared_calibration_error, or 0. The first three leave out
    records of an open label, like 6+, which do not say a count, and are NaN if there are no others.
    """
    weights = np.ones(len(actual)) if weights is None else weights
    known = closed_weights(actual, labels, weights)
    predicted = probabilities.argmax(axis=1)
    targets = positions_of(actual, labels)
    error = probabilities @ np.array(labels) - actual
    loss = negative_log_likelihood(probabilities, targets)
    scores = ranked_probability_scores(actual, probabilities, labels)
    right, confidence = predicted == targets, probabilities.max(axis=1)
    squared = squared_calibration_error(right, confidence, weights)
    return {
        "rmse_of_mean": mean_of_known(error**2, known) ** 0.5,
        "mae_of_median": mean_of_known(np.abs(medians(probabilities, labels) - actual), known),
        "rps": mean_of_known(scores, known),
        "nll": float(np.average(loss, weights=weights)),
        "calibration_error": max(0.0, squared) ** 0.5,
    }


def medians(probabilities: Floats, labels: list[int]) -> Counts:
    """The lowest count of each bin that at least half of the probability does not exceed."""
    order = np.argsort(labels)
    reached = probabilities[:, order].cumsum(axis=1) >= 0.5 - 1e-12
    counts: Counts = np.array(labels)[order][reached.argmax(axis=1)]
    return counts


def ranked_probability_scores(actual: Counts, probabilities: Floats, labels: list[int]) -> Floats:
    """How far each bin's distribution is from its count, in items; 0 is perfect.

    Unlike the negative log-likelihood, the score depends on how many items a prediction is off; for
    a certain answer it is the absolute error. It is the integral over the counts of the squared
    difference between the predicted and the actual cumulative distribution (Epstein, A Scoring
    System for Probability Forecasts of Ranked Categories, Journal of Applied Meteorology 1969).
    """
    order = np.argsort(labels)
    counts = np.array(labels)[order]
    predicted = probabilities[:, order].cumsum(axis=1)
    observed = actual[:, None] <= counts
    squares = (predicted - observed)[:, :-1] ** 2
    scores: Floats = squares @ np.diff(counts).astype(np.float64)
    return scores


def recall_and_precision(confusion: Floats) -> tuple[Floats, Floats]:
    """The share of each label's bins that were found, and of its predictions that are right.

    Recall is 0 for a label without bins, and precision for a label without predictions.
    """
    right = np.diag(confusion).astype(np.float64)
    recall, precision = (
        np.divide(right, total, out=np.zeros_like(right), where=total > 0)
        for total in (confusion.sum(axis=1), confusion.sum(axis=0))
    )
    return recall, precision


def reliability_table(right: NDArray[np.bool_], confidence: NDArray[np.floating]) -> pd.DataFrame:
    """How often predictions of about the same confidence are right.

    The table has a row for each interval of confidence with any predictions: their mean confidence,
    their accuracy, which is ideally the same, and their number. There are CONFIDENCE_INTERVALS of
    equal width, closed on the right, as in section 2 of Guo et al., On Calibration of Modern Neural
    Networks, 2017 (arXiv:1706.04599).
    """
    ones = np.ones(len(right))
    columns = [ones, confidence, right.astype(np.float64)]
    bins, confident, rightly = _sums_by_confidence(confidence, ones, columns)
    table = pd.DataFrame(
        {
            "confidence": confident / np.maximum(bins, 1),
            "accuracy": rightly / np.maximum(bins, 1),
            "test_bins": bins,
        }
    )
    return table[bins > 0].reset_index(drop=True)


def squared_calibration_error(
    right: NDArray[np.bool_], confidence: NDArray[np.floating], weights: Floats
) -> float:
    """The mean squared distance between confidence and accuracy over all bins, without bias.

    The expected calibration error of Guo et al. is positive even for a perfectly calibrated model,
    because chance moves the accuracy of each interval of confidence. Here each interval's square is
    the mean product of the differences of two different bins, to which chance adds nothing on
    average; so it may be negative. This is the debiased estimator of Kumar et al., Verified
    Uncertainty Calibration, 2019 (arXiv:1909.10155), with the variance of the difference instead of
    the accuracy.
    """
    difference = confidence - right
    bins, total, squares = _sums_by_confidence(
        confidence, weights, [np.ones(len(right)), difference, difference**2]
    )
    # An interval with one bin has no such product.
    several = bins > 1
    products = total[several] ** 2 - squares[several]
    return float((products / (bins[several] - 1)).sum() / bins.sum())


def _sums_by_confidence(
    confidence: NDArray[np.floating], weights: Floats, columns: Sequence[NDArray[np.floating]]
) -> list[Floats]:
    """The weighted sums of the columns in each interval of confidence."""
    edges = np.linspace(0, 1, CONFIDENCE_INTERVALS + 1)
    interval = np.digitize(confidence, edges[1:-1], right=True)
    return [
        np.bincount(interval, weights * values, minlength=CONFIDENCE_INTERVALS).astype(np.float64)
        for values in columns
    ]
