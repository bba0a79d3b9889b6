"""How good predicted counts are. Everything follows from the confusion matrix."""

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


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
