"""How good predicted counts are, and how far their confidence can be trusted."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Counts = NDArray[np.int64]
CONFIDENCE_INTERVALS = 10


def confusion_matrix(actual: Counts, predicted: Counts, labels: list[int]) -> Counts:
    """[actual, predicted] in the order of `labels`, which hold every value."""
    places = {label: place for place, label in enumerate(labels)}
    matrix = np.zeros((len(labels), len(labels)), np.int64)
    for truth, guess in zip(actual.tolist(), predicted.tolist(), strict=True):
        matrix[places[truth], places[guess]] += 1
    return matrix


def headline_metrics(
    actual: Counts, predicted: Counts, labels: list[int], majority: int
) -> dict[str, float | int]:
    """The numbers of metrics.json. RMSE and MAE are in items, the others shares of 1.

    `majority` is the quantity that the majority-class baseline always answers. macro_f1 is the
    mean F1 over the labels that occur; F1 is 0 for one that is never predicted rightly.
    """
    error = np.abs(predicted - actual)
    recall, precision = recall_and_precision(confusion_matrix(actual, predicted, labels))
    total = recall + precision
    f1 = np.divide(2 * recall * precision, total, out=np.zeros_like(total), where=total > 0)
    occurs = np.isin(labels, np.union1d(actual, predicted))
    return {
        "accuracy": float((error == 0).mean()),
        "majority_accuracy": float((actual == majority).mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "mae": float(error.mean()),
        "within_one": float((error <= 1).mean()),
        "macro_f1": float(f1[occurs].mean()),
        "test_bins": len(actual),
    }


def recall_and_precision(
    confusion: Counts,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per label: the share of its bins that were found, and of its predictions that are right.

    0 for a label without bins, or without predictions.
    """
    right = np.diag(confusion).astype(np.float64)
    recall, precision = (
        np.divide(right, total, out=np.zeros_like(right), where=total > 0)
        for total in (confusion.sum(axis=1), confusion.sum(axis=0))
    )
    return recall, precision


def reliability_table(right: NDArray[np.bool_], confidence: NDArray[np.floating]) -> pd.DataFrame:
    """How often predictions of about the same confidence are right: ideally as often as it says.

    A row per interval of confidence that has any: their mean confidence, accuracy and number.
    There are CONFIDENCE_INTERVALS of equal width, closed on the right, as in section 2 of Guo et
    al., On Calibration of Modern Neural Networks, 2017 (arXiv:1706.04599).
    """
    edges = np.linspace(0, 1, CONFIDENCE_INTERVALS + 1)
    interval = np.digitize(confidence, edges[1:-1], right=True)
    columns = {"confidence": np.float64(confidence), "accuracy": right, "test_bins": 1}
    aggregations = {"confidence": "mean", "accuracy": "mean", "test_bins": "sum"}
    return pd.DataFrame(columns).groupby(interval).agg(aggregations).reset_index(drop=True)


def expected_calibration_error(reliability: pd.DataFrame) -> float:
    """The mean distance of confidence and accuracy over all bins (the same paper's ECE, eq. 3)."""
    distance = (reliability["confidence"] - reliability["accuracy"]).abs()
    return float(np.average(distance, weights=reliability["test_bins"]))
