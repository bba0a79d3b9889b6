"""The metrics, against scikit-learn and by hand."""

import math

import numpy as np
import pytest
import sklearn.calibration
import sklearn.metrics
from numpy.typing import NDArray

from stages.core.metrics import (
    CONFIDENCE_INTERVALS,
    confusion_matrix,
    expected_calibration_error,
    headline_metrics,
    recall_and_precision,
    reliability_table,
)

LABELS = [1, 2, 3, 4, 5]
Counts = NDArray[np.int64]


def drawn(seed: int, occurring: list[int]) -> tuple[Counts, Counts]:
    """Some counts and predictions that are right in about half of the cases."""
    chance = np.random.default_rng(seed)
    actual = chance.choice(occurring, 60)
    guessed = chance.choice(occurring, 60)
    return actual, np.where(chance.random(60) < 0.5, actual, guessed)


every_draw = pytest.mark.parametrize(
    ("seed", "occurring"),
    [(0, LABELS), (1, LABELS), (2, [2, 3, 5]), (3, [1, 4]), (4, [3])],
    ids=str,
)


@every_draw
def test_headline_metrics_are_scikit_learns(seed: int, occurring: list[int]) -> None:
    actual, predicted = drawn(seed, occurring)

    metrics = headline_metrics(actual, predicted, LABELS, majority=3)

    expected = {
        "accuracy": sklearn.metrics.accuracy_score(actual, predicted),
        "majority_accuracy": sklearn.metrics.accuracy_score(actual, np.full(60, 3)),
        "rmse": sklearn.metrics.root_mean_squared_error(actual, predicted),
        "mae": sklearn.metrics.mean_absolute_error(actual, predicted),
        "within_one": np.mean(np.abs(actual - predicted) < 2),
        "macro_f1": sklearn.metrics.f1_score(actual, predicted, average="macro", zero_division=0),
        "test_bins": 60,
    }
    assert metrics == pytest.approx(expected, abs=1e-12)


@every_draw
def test_the_confusion_matrix_is_scikit_learns(seed: int, occurring: list[int]) -> None:
    actual, predicted = drawn(seed, occurring)

    matrix = confusion_matrix(actual, predicted, LABELS)

    expected = sklearn.metrics.confusion_matrix(actual, predicted, labels=LABELS)
    np.testing.assert_array_equal(matrix, expected)


@every_draw
def test_recall_and_precision_are_scikit_learns(seed: int, occurring: list[int]) -> None:
    actual, predicted = drawn(seed, occurring)

    recall, precision = recall_and_precision(confusion_matrix(actual, predicted, LABELS))

    expected = sklearn.metrics.precision_recall_fscore_support(
        actual, predicted, labels=LABELS, zero_division=0
    )
    np.testing.assert_allclose(precision, expected[0], atol=1e-12)
    np.testing.assert_allclose(recall, expected[1], atol=1e-12)


def test_a_case_worked_by_hand() -> None:
    actual = np.array([1, 1, 2, 3])
    predicted = np.array([1, 2, 2, 1])

    assert headline_metrics(actual, predicted, [1, 2, 3], majority=1) == pytest.approx(
        {
            "accuracy": 2 / 4,
            "majority_accuracy": 2 / 4,
            "rmse": (5 / 4) ** 0.5,  # errors 0, 1, 0, 2
            "mae": 3 / 4,
            "within_one": 3 / 4,
            "macro_f1": (1 / 2 + 2 / 3 + 0) / 3,
            "test_bins": 4,
        }
    )
    matrix = confusion_matrix(actual, predicted, [1, 2, 3])
    np.testing.assert_array_equal(matrix, [[1, 1, 0], [0, 1, 0], [1, 0, 0]])


def test_errors_of_either_sign_count_the_same() -> None:
    low, high = np.array([1, 2]), np.array([3, 3])

    for metric in ("rmse", "mae", "within_one"):
        below = headline_metrics(high, low, LABELS, majority=1)
        above = headline_metrics(low, high, LABELS, majority=1)
        assert below[metric] == above[metric]


def test_everything_right_is_a_perfect_score_though_labels_are_missing() -> None:
    counts = np.array([2, 2, 5])

    metrics = headline_metrics(counts, counts, LABELS, majority=1)

    assert metrics["accuracy"] == metrics["within_one"] == metrics["macro_f1"] == 1
    assert metrics["rmse"] == metrics["mae"] == metrics["majority_accuracy"] == 0


def test_a_label_that_is_only_predicted_lowers_macro_f1() -> None:
    actual, predicted = np.array([1, 1, 1, 1]), np.array([1, 1, 1, 2])

    metrics = headline_metrics(actual, predicted, LABELS, majority=1)

    assert metrics["macro_f1"] == pytest.approx((6 / 7 + 0) / 2)


def test_a_label_without_bins_or_predictions_has_recall_and_precision_0() -> None:
    recall, precision = recall_and_precision(np.array([[2, 0, 1], [0, 0, 0], [0, 0, 0]]))

    np.testing.assert_allclose(recall, [2 / 3, 0, 0])
    np.testing.assert_allclose(precision, [1, 0, 0])


def drawn_confidence(seed: int) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Confidences above that of chance among five, and predictions that are right less often."""
    chance = np.random.default_rng(seed)
    confidence = chance.uniform(0.2, 1, 500).astype(np.float32)
    return chance.random(500) < confidence**2, confidence


@pytest.mark.parametrize("seed", range(3))
def test_reliability_is_scikit_learns(seed: int) -> None:
    right, confidence = drawn_confidence(seed)

    table = reliability_table(right, confidence)

    accuracy, mean = sklearn.calibration.calibration_curve(
        right, confidence.astype(np.float64), n_bins=CONFIDENCE_INTERVALS
    )
    assert table.columns.tolist() == ["confidence", "accuracy", "test_bins"]
    np.testing.assert_allclose(table["accuracy"], accuracy, atol=1e-12)
    np.testing.assert_allclose(table["confidence"], mean, atol=1e-12)
    assert table["test_bins"].sum() == 500


@pytest.mark.parametrize("seed", range(3))
def test_the_calibration_error_is_the_papers_sum(seed: int) -> None:
    right, confidence = drawn_confidence(seed)

    error = expected_calibration_error(reliability_table(right, confidence))

    expected = 0.0
    for number in range(CONFIDENCE_INTERVALS):
        members = [
            (float(sure), bool(hit))
            for sure, hit in zip(confidence, right, strict=True)
            if math.ceil(float(sure) * CONFIDENCE_INTERVALS) == number + 1
        ]
        if members:
            gap = sum(hit for _, hit in members) - sum(sure for sure, _ in members)
            expected += abs(gap) / 500
    assert error == pytest.approx(expected, abs=1e-12)
    assert error > 0.05


def test_a_reliability_worked_by_hand() -> None:
    right = np.array([True, False, True, True, False])
    # An interval has its upper end, and 1 is in the last one.
    confidence = np.array([0.25, 0.3, 0.31, 1.0, 0.95])

    table = reliability_table(right, confidence)

    assert table["confidence"].tolist() == pytest.approx([0.275, 0.31, 0.975])
    assert table["accuracy"].tolist() == [0.5, 1.0, 0.5]
    assert table["test_bins"].tolist() == [2, 1, 2]
    assert expected_calibration_error(table) == pytest.approx((2 * 0.225 + 0.69 + 2 * 0.475) / 5)


def test_confidence_that_is_as_often_right_has_no_calibration_error() -> None:
    right = np.arange(10) < 8

    assert expected_calibration_error(reliability_table(right, np.full(10, 0.8))) == pytest.approx(
        0
    )
