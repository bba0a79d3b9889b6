"""The metrics, against scikit-learn and by hand."""

import math
from fractions import Fraction

import numpy as np
import pytest
import sklearn.calibration
import sklearn.metrics
from numpy.typing import NDArray

from stages.scoring.metrics import (
    CONFIDENCE_INTERVALS,
    confusion_matrix,
    counting_metrics,
    expected_calibration_error,
    probability_metrics,
    recall_and_precision,
    reliability_table,
)

LABELS = [1, 2, 3, 4, 5]
Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


def drawn(seed: int, occurring: list[int]) -> tuple[Counts, Counts]:
    """Some counts and predictions that are right in about half of the cases."""
    chance = np.random.default_rng(seed)
    actual = chance.choice(occurring, 60)
    guessed = chance.choice(occurring, 60)
    return actual, np.where(chance.random(60) < 0.5, actual, guessed)


def drawn_probabilities(seed: int, actual: Counts, labels: list[int]) -> Floats:
    """A distribution for each bin that favours its count."""
    chance = np.random.default_rng([seed, 1])
    scores = chance.gamma(0.7, size=(len(actual), len(labels)))
    scores += chance.random((len(actual), 1)) * (actual[:, None] == labels)
    probabilities: Floats = scores / scores.sum(axis=1, keepdims=True)
    return probabilities


def drawn_weights(seed: int) -> Floats:
    """How often each of 60 bins might be in a bootstrap sample: some of them never."""
    return np.random.default_rng([seed, 2]).poisson(1.0, 60).astype(np.float64)


every_draw = pytest.mark.parametrize(
    ("seed", "occurring"),
    [(0, LABELS), (1, LABELS), (2, [2, 3, 5]), (3, [1, 4]), (4, [3])],
    ids=str,
)


def sklearn_counting(
    actual: Counts, predicted: Counts, weights: Floats | None = None
) -> dict[str, float]:
    f1 = sklearn.metrics.f1_score(
        actual, predicted, average="macro", zero_division=0, sample_weight=weights
    )
    constant = len({*actual.tolist(), *predicted.tolist()}) == 1
    kappa = sklearn.metrics.cohen_kappa_score
    near = np.average(np.abs(actual - predicted) < 2, weights=weights)
    return {
        "accuracy": sklearn.metrics.accuracy_score(actual, predicted, sample_weight=weights),
        "rmse": sklearn.metrics.root_mean_squared_error(actual, predicted, sample_weight=weights),
        "mae": sklearn.metrics.mean_absolute_error(actual, predicted, sample_weight=weights),
        "within_one": float(near),
        "macro_f1": f1,
        # scikit-learn leaves that of one count undefined.
        "kappa": 0.0
        if constant
        else kappa(actual, predicted, labels=LABELS, weights="quadratic", sample_weight=weights),
    }


@every_draw
def test_counting_metrics_are_scikit_learns(seed: int, occurring: list[int]) -> None:
    actual, predicted = drawn(seed, occurring)

    metrics = counting_metrics(actual, predicted, LABELS)

    assert metrics == pytest.approx(sklearn_counting(actual, predicted), abs=1e-12)


@every_draw
def test_weighted_counting_metrics_are_scikit_learns(seed: int, occurring: list[int]) -> None:
    actual, predicted = drawn(seed, occurring)
    weights = np.random.default_rng(seed).uniform(0.1, 3, 60)

    metrics = counting_metrics(actual, predicted, LABELS, weights)

    expected = sklearn_counting(actual, predicted, weights)
    assert metrics == pytest.approx(expected, abs=1e-12)
    if len(occurring) > 1:
        assert metrics["rmse"] != pytest.approx(
            counting_metrics(actual, predicted, LABELS)["rmse"], rel=1e-4
        )


@every_draw
def test_a_bin_of_weight_2_counts_as_a_bin_twice(seed: int, occurring: list[int]) -> None:
    actual, predicted = drawn(seed, occurring)
    probabilities = drawn_probabilities(seed, actual, LABELS)
    weights = drawn_weights(seed)
    assert {0, 1, 2} <= set(weights)
    rows = np.repeat(np.arange(60), weights.astype(int))

    counting = counting_metrics(actual, predicted, LABELS, weights)
    probability = probability_metrics(actual, probabilities, LABELS, weights)

    repeated = counting_metrics(actual[rows], predicted[rows], LABELS)
    assert counting == pytest.approx(repeated, abs=1e-12)
    repeated = probability_metrics(actual[rows], probabilities[rows], LABELS)
    assert probability == pytest.approx(repeated, abs=1e-12)


@every_draw
@pytest.mark.parametrize("weighted", [False, True])
def test_probability_metrics_are_scikit_learns(
    seed: int, occurring: list[int], weighted: bool
) -> None:
    actual, _ = drawn(seed, occurring)
    probabilities = drawn_probabilities(seed, actual, LABELS)
    weights = np.random.default_rng(seed).uniform(0.1, 3, 60) if weighted else None

    metrics = probability_metrics(actual, probabilities, LABELS, weights)

    means = [sum(p * label for p, label in zip(row, LABELS, strict=True)) for row in probabilities]
    rmse = sklearn.metrics.root_mean_squared_error(actual, means, sample_weight=weights)
    loss = sklearn.metrics.log_loss(actual, probabilities, labels=LABELS, sample_weight=weights)
    assert metrics.keys() == {"rmse_of_mean", "nll", "ece"}
    assert metrics["rmse_of_mean"] == pytest.approx(rmse, abs=1e-12)
    assert metrics["nll"] == pytest.approx(loss, abs=1e-12)
    right = np.array(LABELS)[probabilities.argmax(axis=1)] == actual
    confidence = probabilities.max(axis=1)
    error = papers_calibration_error(right, confidence, weights)
    assert metrics["ece"] == pytest.approx(error, abs=1e-12)


@every_draw
def test_the_confusion_matrix_is_scikit_learns(seed: int, occurring: list[int]) -> None:
    actual, predicted = drawn(seed, occurring)
    weights = drawn_weights(seed)

    for labels in (LABELS, [4, 1, 5, 3, 2]):
        expected = sklearn.metrics.confusion_matrix(actual, predicted, labels=labels)
        np.testing.assert_array_equal(confusion_matrix(actual, predicted, labels), expected)
        expected = sklearn.metrics.confusion_matrix(
            actual, predicted, labels=labels, sample_weight=weights
        )
        found = confusion_matrix(actual, predicted, labels, weights)
        np.testing.assert_array_equal(found, expected)


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

    assert counting_metrics(actual, predicted, [1, 2, 3]) == pytest.approx(
        {
            "accuracy": 2 / 4,
            "rmse": (5 / 4) ** 0.5,  # errors 0, 1, 0, 2
            "mae": 3 / 4,
            "within_one": 3 / 4,
            "macro_f1": (1 / 2 + 2 / 3 + 0) / 3,
            # Squared errors add up to 5; those of all 16 pairs to 16, so of 4 by chance to 4.
            "kappa": 1 - 5 / 4,
        }
    )
    matrix = confusion_matrix(actual, predicted, [1, 2, 3])
    np.testing.assert_array_equal(matrix, [[1, 1, 0], [0, 1, 0], [1, 0, 0]])


def test_probability_metrics_worked_by_hand() -> None:
    actual = np.array([1, 3])
    probabilities = np.array([[0.5, 0.25, 0.25], [0.75, 0.0, 0.25]])

    assert probability_metrics(actual, probabilities, [1, 2, 3]) == pytest.approx(
        {
            # The means are 1.75 and 1.5.
            "rmse_of_mean": ((0.75**2 + 1.5**2) / 2) ** 0.5,
            "nll": (math.log(2) + math.log(4)) / 2,
            # Right with 0.5 and wrong with 0.75, in intervals of their own.
            "ece": (0.5 + 0.75) / 2,
        }
    )


def test_a_count_of_probability_0_costs_much_but_not_all() -> None:
    metrics = probability_metrics(np.array([1, 2]), np.array([[0.0, 1.0], [0.0, 1.0]]), [1, 2])

    assert 40 < metrics["nll"] < 50


def concordance(actual: Counts, predicted: Counts) -> float:
    """Lin's coefficient, which quadratic kappa is (Fleiss and Cohen 1973)."""
    covariance = np.mean((actual - actual.mean()) * (predicted - predicted.mean()))
    shift = (actual.mean() - predicted.mean()) ** 2
    return float(2 * covariance / (actual.var() + predicted.var() + shift))


@pytest.mark.parametrize("labels", [[1, 2, 5], [0, 10], [7, 3, 4, 0]], ids=str)
def test_kappa_weighs_errors_by_items_and_not_by_places(labels: list[int]) -> None:
    actual, predicted = drawn(0, labels)

    kappa = counting_metrics(actual, predicted, labels)["kappa"]

    assert kappa == pytest.approx(concordance(actual, predicted), abs=1e-12)
    assert 0.2 < kappa < 0.8


def test_kappa_is_1_for_perfect_0_for_chance_and_negative_for_worse() -> None:
    actual = np.array([1, 1, 5, 5])
    answers = {1.0: actual, 0.0: np.array([1, 5, 1, 5]), -1.0: np.array([5, 5, 1, 1])}

    for kappa, predicted in answers.items():
        assert counting_metrics(actual, predicted, LABELS)["kappa"] == pytest.approx(kappa)
    # All alike is chance too.
    assert counting_metrics(actual, np.full(4, 3), LABELS)["kappa"] == pytest.approx(0)


def test_errors_of_either_sign_count_the_same() -> None:
    low, high = np.array([1, 2]), np.array([3, 3])

    for metric in ("rmse", "mae", "within_one", "kappa"):
        below = counting_metrics(high, low, LABELS)
        above = counting_metrics(low, high, LABELS)
        assert below[metric] == above[metric]


def test_everything_right_is_a_perfect_score_though_labels_are_missing() -> None:
    counts = np.array([2, 2, 5])

    metrics = counting_metrics(counts, counts, LABELS)

    for name in ("accuracy", "within_one", "macro_f1", "kappa"):
        assert metrics[name] == 1
    assert metrics["rmse"] == metrics["mae"] == 0


def test_a_label_that_is_only_predicted_lowers_macro_f1() -> None:
    actual, predicted = np.array([1, 1, 1, 1]), np.array([1, 1, 1, 2])

    metrics = counting_metrics(actual, predicted, LABELS)

    assert metrics["macro_f1"] == pytest.approx((6 / 7 + 0) / 2)


def test_a_label_without_bins_or_predictions_has_recall_and_precision_0() -> None:
    recall, precision = recall_and_precision(np.array([[2.0, 0, 1], [0, 0, 0], [0, 0, 0]]))

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
def test_reliability_with_weights_is_that_of_repeated_bins(seed: int) -> None:
    right, confidence = drawn_confidence(seed)
    weights = np.random.default_rng(seed).integers(0, 4, 500)
    # An interval whose bins have no weight has no row.
    weights[confidence < 0.4] = 0

    table = reliability_table(right, confidence, weights.astype(np.float64))

    repeated = reliability_table(np.repeat(right, weights), np.repeat(confidence, weights))
    assert len(table) == 6
    np.testing.assert_allclose(table, repeated, rtol=1e-12)


def papers_calibration_error(
    right: NDArray[np.bool_], confidence: NDArray[np.floating], weights: Floats | None = None
) -> float:
    """Section 2 of Guo et al., interval by interval."""
    weights = np.ones(len(right)) if weights is None else weights
    rows = [
        # Exactly, where 10 times a float32 would be rounded.
        (math.ceil(CONFIDENCE_INTERVALS * Fraction(float(sure))), weight, float(sure), bool(hit))
        for sure, hit, weight in zip(confidence, right, weights.tolist(), strict=True)
    ]
    error = 0.0
    for number in range(1, CONFIDENCE_INTERVALS + 1):
        members = [row[1:] for row in rows if row[0] == number]
        gap = sum(weight * (hit - sure) for weight, sure, hit in members)
        error += abs(gap) / sum(weight for _, weight, _, _ in rows)
    return error


@pytest.mark.parametrize("seed", range(3))
def test_the_calibration_error_is_the_papers_sum(seed: int) -> None:
    right, confidence = drawn_confidence(seed)

    error = expected_calibration_error(reliability_table(right, confidence))

    assert error == pytest.approx(papers_calibration_error(right, confidence), abs=1e-12)
    assert error > 0.05


def test_a_reliability_worked_by_hand() -> None:
    right = np.array([True, False, True, True, False])
    # An interval has its upper end, and 1 is in the last one.
    confidence = np.array([0.45, 0.5, 0.51, 1.0, 0.95])

    table = reliability_table(right, confidence)

    assert table["confidence"].tolist() == pytest.approx([0.475, 0.51, 0.975])
    assert table["accuracy"].tolist() == [0.5, 1.0, 0.5]
    assert table["test_bins"].tolist() == [2, 1, 2]
    assert expected_calibration_error(table) == pytest.approx((2 * 0.025 + 0.49 + 2 * 0.475) / 5)


def test_confidence_that_is_as_often_right_has_no_calibration_error() -> None:
    right = np.arange(10) < 8

    assert expected_calibration_error(reliability_table(right, np.full(10, 0.8))) == pytest.approx(
        0
    )
