"""The metrics, compared with scikit-learn and with results worked by hand."""

import math
from fractions import Fraction

import numpy as np
import pytest
import sklearn.metrics
from numpy.typing import NDArray

from stages.scoring.metrics import (
    CONFIDENCE_INTERVALS,
    confusion_matrix,
    counting_metrics,
    probability_metrics,
    ranked_probability_scores,
    recall_and_precision,
    reliability_table,
    squared_calibration_error,
)

LABELS = [1, 2, 3, 4, 5]
Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


def random_counts(seed: int, occurring: list[int]) -> tuple[Counts, Counts]:
    """Counts, and predictions of which about half are right."""
    chance = np.random.default_rng(seed)
    actual = chance.choice(occurring, 60)
    guessed = chance.choice(occurring, 60)
    return actual, np.where(chance.random(60) < 0.5, actual, guessed)


def random_probabilities(seed: int, actual: Counts) -> Floats:
    """A distribution for each bin that favours its count."""
    chance = np.random.default_rng([seed, 1])
    scores = chance.gamma(0.7, size=(len(actual), len(LABELS)))
    scores += chance.random((len(actual), 1)) * (actual[:, None] == LABELS)
    probabilities: Floats = scores / scores.sum(axis=1, keepdims=True)
    return probabilities


def random_weights(seed: int) -> Floats:
    """How often each of 60 bins is in a bootstrap sample; some are never."""
    return np.random.default_rng([seed, 2]).poisson(1.0, 60).astype(np.float64)


every_seed = pytest.mark.parametrize(
    ("seed", "occurring"),
    [(0, LABELS), (1, LABELS), (2, [2, 3, 5]), (3, [1, 4]), (4, [3])],
    ids=str,
)
weighted_or_not = pytest.mark.parametrize("weighted", [False, True])


@every_seed
@weighted_or_not
def test_counting_metrics_are_scikit_learns(
    seed: int, occurring: list[int], *, weighted: bool
) -> None:
    actual, predicted = random_counts(seed, occurring)
    weights = np.random.default_rng(seed).uniform(0.1, 3, 60) if weighted else None
    every = {"y_true": actual, "y_pred": predicted, "sample_weight": weights}
    near = np.average(np.abs(actual - predicted) < 2, weights=weights)
    kappa = sklearn.metrics.cohen_kappa_score(
        actual, predicted, labels=LABELS, weights="quadratic", sample_weight=weights
    )

    assert counting_metrics(actual, predicted, LABELS, weights) == pytest.approx(
        {
            "accuracy": sklearn.metrics.accuracy_score(**every),
            "rmse": sklearn.metrics.root_mean_squared_error(**every),
            "mae": sklearn.metrics.mean_absolute_error(**every),
            "within_one": float(near),
            "macro_f1": sklearn.metrics.f1_score(**every, average="macro", zero_division=0),
            # scikit-learn leaves kappa undefined if there is a single count.
            "kappa": 0.0 if len(occurring) == 1 else kappa,
        },
        abs=1e-12,
    )


@every_seed
@weighted_or_not
def test_probability_metrics_are_scikit_learns_and_those_of_plain_loops(
    seed: int, occurring: list[int], *, weighted: bool
) -> None:
    actual, _ = random_counts(seed, occurring)
    probabilities = random_probabilities(seed, actual)
    weights = np.random.default_rng(seed).uniform(0.1, 3, 60) if weighted else None
    means = [sum(p * label for p, label in zip(row, LABELS, strict=True)) for row in probabilities]
    # The median of many draws that have each label as often as its probability says.
    draws = [np.repeat(LABELS, np.rint(1e6 * row).astype(int)) for row in probabilities]
    middles = [np.sort(one)[(len(one) - 1) // 2] for one in draws]
    right = np.array(LABELS)[probabilities.argmax(axis=1)] == actual

    assert probability_metrics(actual, probabilities, LABELS, weights) == pytest.approx(
        {
            "rmse_of_mean": sklearn.metrics.root_mean_squared_error(
                actual, means, sample_weight=weights
            ),
            "mae_of_median": sklearn.metrics.mean_absolute_error(
                actual, middles, sample_weight=weights
            ),
            "nll": sklearn.metrics.log_loss(
                actual, probabilities, labels=LABELS, sample_weight=weights
            ),
            "rps": np.average(
                [energy_score(*row) for row in zip(actual, probabilities, strict=True)],
                weights=weights,
            ),
            "calibration_error": max(0.0, error_by_pairs(right, probabilities.max(axis=1), weights))
            ** 0.5,
        },
        abs=1e-12,
    )


@every_seed
def test_a_bin_of_weight_2_counts_as_a_bin_twice(seed: int, occurring: list[int]) -> None:
    actual, predicted = random_counts(seed, occurring)
    probabilities = random_probabilities(seed, actual)
    weights = random_weights(seed)
    assert {0, 1, 2} <= set(weights)
    rows = np.repeat(np.arange(60), weights.astype(int))

    counting = counting_metrics(actual, predicted, LABELS, weights)
    probability = probability_metrics(actual, probabilities, LABELS, weights)

    repeated = counting_metrics(actual[rows], predicted[rows], LABELS)
    assert counting == pytest.approx(repeated, abs=1e-12)
    repeated = probability_metrics(actual[rows], probabilities[rows], LABELS)
    assert probability == pytest.approx(repeated, abs=1e-12)


@every_seed
@weighted_or_not
def test_confusion_recall_and_precision_are_scikit_learns(
    seed: int, occurring: list[int], *, weighted: bool
) -> None:
    actual, predicted = random_counts(seed, occurring)
    weights = random_weights(seed) if weighted else None

    for labels in (LABELS, [4, 1, 5, 3, 2]):
        matrix = confusion_matrix(actual, predicted, labels, weights)
        recall, precision = recall_and_precision(matrix)

        every = {"labels": labels, "sample_weight": weights}
        expected = sklearn.metrics.confusion_matrix(actual, predicted, **every)
        np.testing.assert_array_equal(matrix, expected)
        expected = sklearn.metrics.precision_recall_fscore_support(
            actual, predicted, zero_division=0, **every
        )
        np.testing.assert_allclose(precision, expected[0], atol=1e-12)
        np.testing.assert_allclose(recall, expected[1], atol=1e-12)


@pytest.mark.parametrize(
    ("actual", "predicted", "expected"),
    [
        (
            [1, 1, 2, 3],
            [1, 2, 2, 1],
            {
                "accuracy": 2 / 4,
                "rmse": (5 / 4) ** 0.5,  # errors 0, 1, 0, 2
                "mae": 3 / 4,
                "within_one": 3 / 4,
                "macro_f1": (1 / 2 + 2 / 3 + 0) / 3,
                # The squared errors add up to 5, and to 4 for a quarter of all 16 pairs.
                "kappa": 1 - 5 / 4,
            },
        ),
        (
            [2, 2, 5],
            [2, 2, 5],
            {"accuracy": 1, "rmse": 0, "mae": 0, "within_one": 1, "macro_f1": 1, "kappa": 1},
        ),
        # No record has the label 2.
        ([1, 1, 1, 1], [1, 1, 1, 2], {"macro_f1": (6 / 7 + 0) / 2}),
        ([1, 1, 5, 5], [1, 5, 1, 5], {"kappa": 0}),
        ([1, 1, 5, 5], [3, 3, 3, 3], {"kappa": 0}),
        ([1, 1, 5, 5], [5, 5, 1, 1], {"kappa": -1}),
    ],
    ids=["some", "perfect", "only predicted", "chance", "one answer", "worse than chance"],
)
def test_counting_metrics_worked_by_hand(
    actual: list[int], predicted: list[int], expected: dict[str, float]
) -> None:
    metrics = counting_metrics(np.array(actual), np.array(predicted), LABELS)

    assert metrics | expected == pytest.approx(metrics)


def test_a_count_of_probability_0_has_a_large_but_finite_loss() -> None:
    metrics = probability_metrics(np.array([1, 2]), np.array([[0.0, 1.0], [0.0, 1.0]]), [1, 2])

    assert 40 < metrics["nll"] < 50


def concordance(actual: Counts, predicted: Counts) -> float:
    """Lin's coefficient, which equals quadratic kappa (Fleiss and Cohen 1973)."""
    covariance = np.mean((actual - actual.mean()) * (predicted - predicted.mean()))
    shift = (actual.mean() - predicted.mean()) ** 2
    return float(2 * covariance / (actual.var() + predicted.var() + shift))


@pytest.mark.parametrize("labels", [[1, 2, 5], [0, 10], [7, 3, 4, 0]], ids=str)
def test_kappa_weights_errors_by_items_and_not_by_positions(labels: list[int]) -> None:
    actual, predicted = random_counts(0, labels)

    kappa = counting_metrics(actual, predicted, labels)["kappa"]

    assert kappa == pytest.approx(concordance(actual, predicted), abs=1e-12)
    assert 0.2 < kappa < 0.8


def energy_score(actual: int, probabilities: Floats) -> float:
    """The ranked probability score in its other form, from mean distances between counts."""
    pairs = list(zip(LABELS, probabilities.tolist(), strict=True))
    to_actual = sum(p * abs(label - actual) for label, p in pairs)
    to_each_other = sum(p * q * abs(label - other) for label, p in pairs for other, q in pairs)
    return float(to_actual - to_each_other / 2)


@pytest.mark.parametrize(
    ("actual", "probabilities", "labels", "expected"),
    [
        (3, [0.0, 0.0, 1.0, 0.0, 0.0], LABELS, 0),
        # The score of a certain answer is its error, and farther probabilities score worse.
        (3, [1.0, 0.0, 0.0, 0.0, 0.0], LABELS, 2),
        (1, [0.5, 0.5, 0.0, 0.0, 0.0], LABELS, 0.25),
        (1, [0.5, 0.0, 0.0, 0.0, 0.5], LABELS, 4 * 0.25),
        # The score is in items even if the counts have gaps or are in another order.
        (0, [0.0, 1.0], [0, 10], 10),
        (2, [0.5, 0.0, 0.5], [7, 4, 2], 5 * 0.25),
    ],
)
def test_ranked_probability_scores_worked_by_hand(
    actual: int, probabilities: list[float], labels: list[int], expected: float
) -> None:
    scores = ranked_probability_scores(np.array([actual]), np.array([probabilities]), labels)

    assert scores.tolist() == pytest.approx([expected])


def error_by_pairs(
    right: NDArray[np.bool_], confidence: NDArray[np.floating], weights: Floats | None = None
) -> float:
    """The squared calibration error, pair by pair; a weight is how often a bin occurs."""
    weights = np.ones(len(right)) if weights is None else weights
    rows = [
        # A fraction is exact; 10 times a float32 would be rounded.
        (math.ceil(CONFIDENCE_INTERVALS * Fraction(float(sure))), weight, float(sure) - bool(hit))
        for sure, hit, weight in zip(confidence, right, weights.tolist(), strict=True)
    ]
    error = 0.0
    for number in range(1, CONFIDENCE_INTERVALS + 1):
        members = [row[1:] for row in rows if row[0] == number]
        bins = sum(weight for weight, _ in members)
        if bins > 1:
            products = sum(w * v * d * e for w, d in members for v, e in members)
            with_itself = sum(weight * difference**2 for weight, difference in members)
            error += (products - with_itself) / (bins - 1)
    return error / sum(weights)


def test_a_reliability_worked_by_hand() -> None:
    right = np.array([True, False, True, True, False])
    # An interval includes its upper end, and 1 is in the last one.
    confidence = np.array([0.45, 0.5, 0.51, 1.0, 0.95])

    table = reliability_table(right, confidence)

    assert table["confidence"].tolist() == pytest.approx([0.475, 0.51, 0.975])
    assert table["accuracy"].tolist() == [0.5, 1.0, 0.5]
    assert table["test_bins"].tolist() == [2, 1, 2]
    error = squared_calibration_error(right, confidence, np.ones(5))
    # Two products in the first interval and two in the last one, of 5 bins.
    assert error == pytest.approx(2 * (-0.55 * 0.5 + 0 * 0.95) / 5)


def test_a_single_bin_has_no_calibration_error() -> None:
    assert squared_calibration_error(np.array([False]), np.array([0.9]), np.ones(1)) == 0
