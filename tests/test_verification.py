"""Alarms, compared with scikit-learn, plain loops and results worked by hand."""

from itertools import product

import numpy as np
import pytest
import sklearn.metrics
from numpy.typing import NDArray

from stages.scoring.claims import Claims, make_claims, uniform_errors
from stages.scoring.verification import (
    Rates,
    choose_thresholds,
    false_alarms_by_chance,
    precision,
    precision_at,
    rates_at,
    rates_by_count,
    roc_curve,
    roc_metrics,
    roc_table,
    threshold_for,
)

LABELS = [1, 2, 3, 4, 5]
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


def synthetic_bins(seed: int, bins: int = 40, digits: int = 15) -> tuple[Floats, Counts]:
    """Probabilities that favour the actual counts, and the counts; few digits give many ties."""
    chance = np.random.default_rng(seed)
    actual = chance.choice(LABELS, bins)
    scores = chance.gamma(0.7, size=(bins, len(LABELS)))
    scores += 0.5 * (np.abs(actual[:, None] - LABELS) <= chance.integers(0, 2, (bins, 1)))
    return (scores / scores.sum(axis=1, keepdims=True)).round(digits), actual


def uniform_claims(probabilities: Floats, actual: Counts, labels: list[int]) -> Claims:
    return make_claims(probabilities, actual, labels, uniform_errors(actual, labels))


def random_claims(seed: int, bins: int = 40, digits: int = 15) -> Claims:
    return uniform_claims(*synthetic_bins(seed, bins, digits), LABELS)


def random_weights(seed: int, bins: int = 40) -> Floats:
    return np.random.default_rng([seed, 1]).uniform(0.1, 3, bins)


def hand_claims() -> Claims:
    """The claims about three bins with 1, 2 and 3 items."""
    probabilities = np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.1, 0.0, 0.9]])
    return uniform_claims(probabilities, np.array([1, 2, 3]), [1, 2, 3])


every_seed = pytest.mark.parametrize(("seed", "digits"), list(product(range(3), (1, 2, 15))))


@every_seed
@pytest.mark.parametrize("weighted", [False, True])
def test_the_roc_curve_and_its_area_are_scikit_learns(
    seed: int, digits: int, *, weighted: bool
) -> None:
    claims = random_claims(seed, digits=digits)
    weights = random_weights(seed) if weighted else np.ones(40)

    curve = roc_curve(claims, weights)
    metrics = roc_metrics(claims, weights)

    # The positives are the wrong claims, which should score low.
    wrong, of_claim = ~claims.right, claims.weights * weights[claims.bins]
    false_alarms, found, _ = sklearn.metrics.roc_curve(
        wrong, -claims.scores, sample_weight=of_claim, drop_intermediate=False
    )
    np.testing.assert_allclose(curve, [false_alarms, found], atol=1e-12)
    area = sklearn.metrics.roc_auc_score(wrong, -claims.scores, sample_weight=of_claim)
    assert metrics["auroc"] == pytest.approx(area, abs=1e-12)
    assert 0.6 < area < 0.95
    for share in (0.01, 0.05, 0.10):
        most = found[false_alarms <= share + 1e-12].max()
        assert metrics[f"found_at_{100 * share:.0f}"] == pytest.approx(most)


def highest_threshold(scores: Floats, share: float) -> float:
    """The highest score with at most this share below it; the share changes only at scores."""
    return max(float(score) for score in scores if np.mean(scores < score) <= share)


@pytest.mark.parametrize("digits", [1, 2, 15])
@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_is_the_highest_that_keeps_to_the_false_alarms(
    seed: int, digits: int
) -> None:
    chance = np.random.default_rng(seed)
    for bins in (1, 2, 3, 10, 99, 100, 101):
        scores = chance.random(bins).round(digits)
        # 0.29 * 100 is 28.999999999999996 in floating point.
        for share in (0.001, 0.01, 0.05, 0.1, 0.29, 0.5, 0.57, 0.99, *chance.random(5)):
            threshold = threshold_for(scores, share)

            assert threshold == highest_threshold(scores, share), (bins, share)
            # Any higher threshold has more false alarms.
            above = np.nextafter(threshold, np.inf)
            assert np.mean(scores < above) > share


@pytest.mark.parametrize(("bins", "share"), [(120, 0.05), (40, 0.01), (600, 0.05)])
def test_the_false_alarms_of_other_bins_are_in_the_range_as_often_as_it_says(
    bins: int, share: float
) -> None:
    chance = np.random.default_rng(0)
    # For scores from 0 to 1 that are equally frequent, the threshold is the share below it.
    thresholds = [threshold_for(chance.random(bins), share) for _ in range(2000)]

    low, high = false_alarms_by_chance(bins, share)

    within = np.mean([low <= threshold <= high for threshold in thresholds])
    assert within == pytest.approx(0.95, abs=0.015)


def counted_rates(
    probabilities: Floats, actual: Counts, threshold: float, weights: Floats
) -> Rates:
    """The rates, counted in a loop over all claims."""
    alarms: dict[str, float] = dict.fromkeys(Rates._fields, 0.0)
    claims = dict.fromkeys(Rates._fields, 0.0)
    for row, count, weight in zip(probabilities, actual.tolist(), weights.tolist(), strict=True):
        for label, score in zip(LABELS, row, strict=True):
            error = abs(label - count)
            kinds = ["false_alarms"] if error == 0 else ["found"]
            if error:
                kinds.append("found_off_by_one" if error == 1 else "found_off_by_more")
            for kind in kinds:
                claims[kind] += weight
                alarms[kind] += weight * (score < threshold)
    return Rates(*(alarms[kind] / claims[kind] for kind in Rates._fields))


@every_seed
def test_rates_are_those_of_a_plain_loop(seed: int, digits: int) -> None:
    probabilities, actual = synthetic_bins(seed, digits=digits)
    claims = uniform_claims(probabilities, actual, LABELS)

    for threshold in (0.0, 0.1, 0.2, 0.35, 0.9, 1.1):
        for weights in (np.ones(40), random_weights(seed)):
            expected = counted_rates(probabilities, actual, threshold, weights)
            found = rates_at(claims, np.full(5, threshold), weights)
            assert found == pytest.approx(expected, abs=1e-12)


def test_claims_that_are_all_right_have_no_metrics() -> None:
    metrics = roc_metrics(random_claims(0).off_by_at_most(0), np.ones(40))

    assert all(np.isnan(value) for value in metrics.values())


def test_rates_worked_by_hand() -> None:
    claims = hand_claims()

    # The right claims score 0.7, 0.3 and 0.9; a score at the threshold raises no alarm.
    assert rates_at(claims, np.full(3, 0.3), np.ones(3)) == pytest.approx((0, 4 / 6, 2 / 4, 2 / 2))
    assert rates_at(claims, np.full(3, 0.31), np.ones(3)) == pytest.approx(
        (1 / 3, 5 / 6, 3 / 4, 2 / 2)
    )
    # The first bin counts twice and the second one not at all.
    weights = np.array([2.0, 0.0, 1.0])
    assert rates_at(claims, np.full(3, 0.15), weights) == pytest.approx((0, 4 / 6, 1 / 3, 3 / 3))


def test_rates_without_such_claims_are_0() -> None:
    claims = uniform_claims(np.array([[0.4, 0.6]]), np.array([1]), [1, 2])

    assert rates_at(claims, np.full(2, 0.7), np.ones(1)) == (1, 1, 1, 0)
    assert rates_at(claims, np.full(2, 0.7), np.zeros(1)) == (0, 0, 0, 0)


def test_precision_worked_by_hand() -> None:
    # 10 of 1000 records are wrong; 5 of them and a tenth of the other 990 raise alarms.
    assert float(precision(0.5, 0.1, 0.01)) == pytest.approx(5 / (5 + 99))
    assert float(precision(0.5, 0.0, 0.01)) == 1
    assert float(precision(0.0, 0.5, 0.01)) == 0
    # There are no alarms.
    assert float(precision(0.0, 0.0, 0.01)) == 0
    found = precision(np.array([0.5, 0.0]), np.array([0.1, 0.0]), 0.01)
    np.testing.assert_allclose(found, [5 / 104, 0])


def test_precision_at_each_share_of_wrong_records() -> None:
    found = precision_at(Rates(0.1, 0.5, 0.4, 0.8), 1000)

    # 0.5, 5 and 25 wrong records are found among 1000.
    shares = {0.001: 0.5 / (0.5 + 99.9), 0.01: 5 / (5 + 99), 0.05: 25 / (25 + 95)}
    assert found == pytest.approx(shares)
    assert precision_at(Rates(0.1, 0.0, 0.0, 0.0), 1000) == dict.fromkeys(shares, 0)


def test_no_false_alarm_so_far_is_not_taken_for_none_ever() -> None:
    rates = Rates(0.0, 0.5, 0.5, 0.5)

    # 1 of 1000 records is wrong, and found in half of the cases; 1 in 100 of the others may alarm.
    assert precision_at(rates, 300)[0.001] == pytest.approx(0.5 / (0.5 + 9.99))
    # With fewer than 3 right claims, all of them may be false alarms.
    assert precision_at(rates, 2)[0.001] == pytest.approx(0.5 / 999.5)


def curve_points(claims: Claims, bins: int) -> set[tuple[float, float]]:
    curve = (values.tolist() for values in roc_curve(claims, np.ones(bins)))
    return set(zip(*curve, strict=True))


@pytest.mark.parametrize(("bins", "digits"), [(3, 15), (40, 1), (40, 15), (5000, 15), (5000, 3)])
def test_the_table_of_the_roc_curve_has_points_of_it_from_end_to_end(
    bins: int, digits: int
) -> None:
    claims = random_claims(1, bins, digits)

    table = roc_table(claims)

    assert table.columns.tolist() == ["false_alarms", "found"]
    points = list(table.itertuples(index=False, name=None))
    curve = curve_points(claims, bins)
    assert set(points) <= curve
    assert len(set(points)) == len(points) <= 1000
    # The points begin with the most that is found without a false alarm, and never go down or left.
    assert points[0][0] == 0
    assert max(point for point in curve if point[0] == 0) in points
    assert points[-1] == (1, 1)
    assert table["false_alarms"].is_monotonic_increasing
    assert table["found"].is_monotonic_increasing


def test_rates_by_count_worked_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    claims = uniform_claims(probabilities, np.array([1, 1, 2]), [1, 2])

    table = rates_by_count(claims, [1, 2], np.array([0.5, 0.7]))

    columns = ["quantity", "threshold", "right_records", "false_alarms", "found"]
    assert table.columns.tolist() == columns
    # Of the bins with 1 item, the second is an alarm; so is the third, if its record says 1. The
    # higher threshold of 2 flags both bins whose wrong records say 2.
    assert table.to_numpy().tolist() == [[1, 0.5, 2, 0.5, 1.0], [2, 0.7, 1, 0.0, 1.0]]


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.6])
def test_rates_by_count_are_those_of_all_claims_in_the_mean(threshold: float) -> None:
    chance = np.random.default_rng(5)
    labels = [1, 2, 5]
    probabilities = chance.dirichlet([1, 1, 1], 90)
    claims = uniform_claims(probabilities, chance.choice(labels, 90), labels)

    table = rates_by_count(claims, labels, np.full(3, threshold))

    rates = rates_at(claims, np.full(3, threshold), np.ones(90))
    right = table["right_records"]
    assert np.average(table["false_alarms"], weights=right) == pytest.approx(rates.false_alarms)
    assert np.average(table["found"], weights=90 - right) == pytest.approx(rates.found)


def test_a_count_that_does_not_occur_has_no_false_alarms() -> None:
    claims = uniform_claims(np.array([[0.9, 0.1]]), np.array([1]), [1, 2])

    table = rates_by_count(claims, [1, 2], np.full(2, 0.5))

    assert table["false_alarms"].isna().tolist() == [False, True]
    assert table["found"].isna().tolist() == [True, False]


def test_each_count_can_have_its_own_threshold() -> None:
    right_scores, columns = np.arange(1, 201) / 200, np.repeat([0, 1], 100)

    one = choose_thresholds(right_scores, columns, 3, 0.05, "global")
    each = choose_thresholds(right_scores, columns, 3, 0.05, "per_count")

    assert one.tolist() == pytest.approx([11 / 200] * 3)
    # Each flags 5 of its 100 records; the third count has no records, and so the global threshold.
    assert each.tolist() == pytest.approx([6 / 200, 106 / 200, 11 / 200])
