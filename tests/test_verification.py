"""Claims about bins and their alarms, against scikit-learn, plain loops and by hand."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from numpy.typing import NDArray

from stages.scoring.verification import (
    PREVALENCES,
    Claims,
    Rates,
    make_claims,
    precision,
    precision_table,
    rates_at,
    roc_curve,
    roc_metrics,
    roc_table,
    threshold_for,
    verification_table,
)

LABELS = [1, 2, 3, 4, 5]
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


def drawn_bins(seed: int, bins: int = 40, digits: int = 15) -> tuple[Floats, Counts]:
    """Probabilities that favour the count, and the counts; few digits make many ties."""
    chance = np.random.default_rng(seed)
    actual = chance.choice(LABELS, bins)
    scores = chance.gamma(0.7, size=(bins, len(LABELS)))
    scores += 0.5 * (np.abs(actual[:, None] - LABELS) <= chance.integers(0, 2, (bins, 1)))
    return (scores / scores.sum(axis=1, keepdims=True)).round(digits), actual


def drawn_claims(seed: int, bins: int = 40, digits: int = 15) -> Claims:
    return make_claims(*drawn_bins(seed, bins, digits), LABELS)


def drawn_weights(seed: int, bins: int = 40) -> Floats:
    return np.random.default_rng([seed, 1]).uniform(0.1, 3, bins)


def hand_claims() -> Claims:
    """Of three bins with 1, 2 and 3 items."""
    probabilities = np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.1, 0.0, 0.9]])
    return make_claims(probabilities, np.array([1, 2, 3]), [1, 2, 3])


every_draw = pytest.mark.parametrize(("seed", "digits"), list(product(range(3), (1, 2, 15))))


@pytest.mark.parametrize("labels", [LABELS, [5, 2, 4, 1, 3]], ids=str)
def test_each_count_is_claimed_once_of_each_bin_in_the_order_of_scores(labels: list[int]) -> None:
    probabilities, actual = drawn_bins(0)

    claims = make_claims(probabilities, actual, labels)

    expected = sorted(
        (float(probabilities[place, number]), place, abs(label - int(count)))
        for place, count in enumerate(actual)
        for number, label in enumerate(labels)
    )
    found = [claims.scores.tolist(), claims.bins.tolist(), claims.errors.tolist()]
    assert list(zip(*found, strict=True)) == expected
    assert claims.right.tolist() == [error == 0 for _, _, error in expected]
    assert claims.right.sum() == len(actual)


def sklearn_roc(claims: Claims, weights: Floats) -> tuple[Floats, Floats]:
    """Where the positives are the wrong claims, which should score low."""
    false_alarms, found, _ = sklearn.metrics.roc_curve(
        ~claims.right, -claims.scores, sample_weight=weights[claims.bins], drop_intermediate=False
    )
    return false_alarms, found


@every_draw
@pytest.mark.parametrize("weighted", [False, True])
def test_the_roc_curve_is_scikit_learns(seed: int, digits: int, weighted: bool) -> None:
    claims = drawn_claims(seed, digits=digits)
    weights = drawn_weights(seed) if weighted else np.ones(40)

    false_alarms, found = roc_curve(claims, weights)

    expected = sklearn_roc(claims, weights)
    np.testing.assert_allclose(false_alarms, expected[0], atol=1e-12)
    np.testing.assert_allclose(found, expected[1], atol=1e-12)


@every_draw
@pytest.mark.parametrize("weighted", [False, True])
def test_the_auroc_is_scikit_learns(seed: int, digits: int, weighted: bool) -> None:
    claims = drawn_claims(seed, digits=digits)
    weights = drawn_weights(seed) if weighted else np.ones(40)

    expected = sklearn.metrics.roc_auc_score(
        ~claims.right, -claims.scores, sample_weight=weights[claims.bins]
    )
    assert roc_metrics(claims, weights)["auroc"] == pytest.approx(expected, abs=1e-12)
    assert 0.6 < expected < 0.95


@every_draw
def test_the_auroc_is_how_often_a_wrong_claim_scores_lower(seed: int, digits: int) -> None:
    claims = drawn_claims(seed, digits=digits)
    # With bins that are in no sample.
    weights = np.random.default_rng(seed).integers(0, 3, 40).astype(np.float64)

    of_claim = weights[claims.bins]
    right, wrong = claims.right, ~claims.right
    pairs = np.multiply.outer(of_claim[wrong], of_claim[right])
    lower = np.subtract.outer(claims.scores[wrong], claims.scores[right])
    # Ties count half.
    expected = (pairs * ((lower < 0) + 0.5 * (lower == 0))).sum() / pairs.sum()
    assert roc_metrics(claims, weights)["auroc"] == pytest.approx(expected, abs=1e-12)


def test_scores_that_tell_nothing_or_all_have_an_auroc_of_a_half_or_1() -> None:
    actual = np.array([1, 2, 3])
    nothing, everything = np.full((3, 3), 1 / 3), np.eye(3)

    for probabilities, area in ((nothing, 0.5), (everything, 1.0), (1 - everything, 0.0)):
        claims = make_claims(probabilities, actual, [1, 2, 3])
        assert roc_metrics(claims, np.ones(3))["auroc"] == pytest.approx(area)


def highest_threshold(scores: Floats, share: float) -> float:
    """Of all scores, which are where the share below changes."""
    return max(float(score) for score in scores if np.mean(scores < score) <= share)


@pytest.mark.parametrize("digits", [1, 2, 15])
@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_is_the_highest_that_keeps_to_the_false_alarms(
    seed: int, digits: int
) -> None:
    chance = np.random.default_rng(seed)
    for bins in (1, 2, 3, 10, 99, 100, 101):
        scores = chance.random(bins).round(digits)
        for share in (0.001, 0.01, 0.05, 0.1, 0.29, 0.5, 0.57, 0.99, *chance.random(5)):
            threshold = threshold_for(scores, share)

            assert threshold == highest_threshold(scores, share), (bins, share)
            # Any higher, and it is no longer so.
            above = np.nextafter(threshold, np.inf)
            assert np.mean(scores < above) > share


def test_the_false_alarms_of_100_are_whole_numbers_of_them() -> None:
    scores = np.random.default_rng(0).permutation(100) / 100

    # 0.29 * 100 is 28.999999999999996 in floating point.
    for number in (1, 5, 10, 29, 57, 58):
        assert threshold_for(scores, number / 100) == number / 100


def counted_rates(
    probabilities: Floats, actual: Counts, threshold: float, weights: Floats
) -> Rates:
    """By a loop over all claims."""
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


@every_draw
def test_rates_are_those_of_a_plain_loop(seed: int, digits: int) -> None:
    probabilities, actual = drawn_bins(seed, digits=digits)
    claims = make_claims(probabilities, actual, LABELS)

    for threshold in (0.0, 0.1, 0.2, 0.35, 0.9, 1.1):
        for weights in (np.ones(40), drawn_weights(seed)):
            expected = counted_rates(probabilities, actual, threshold, weights)
            assert rates_at(claims, threshold, weights) == pytest.approx(expected, abs=1e-12)


@every_draw
def test_a_chosen_threshold_keeps_to_its_false_alarms(seed: int, digits: int) -> None:
    claims = drawn_claims(seed, digits=digits)

    for share in (0.01, 0.05, 0.1, 0.5):
        threshold = threshold_for(claims.scores[claims.right], share)
        rates = rates_at(claims, threshold, np.ones(40))
        assert rates.false_alarms <= share
        # Which is a point of the ROC curve.
        points = zip(*roc_curve(claims, np.ones(40)), strict=True)
        assert rates[:2] in [pytest.approx(point, abs=1e-12) for point in points]


def test_rates_worked_by_hand() -> None:
    claims = hand_claims()

    # The right claims score 0.7, 0.3 and 0.9; a score at the threshold is no alarm.
    assert rates_at(claims, 0.3, np.ones(3)) == pytest.approx((0, 4 / 6, 2 / 4, 2 / 2))
    assert rates_at(claims, 0.31, np.ones(3)) == pytest.approx((1 / 3, 5 / 6, 3 / 4, 2 / 2))
    # The first bin twice, the second one not at all.
    weights = np.array([2.0, 0.0, 1.0])
    assert rates_at(claims, 0.15, weights) == pytest.approx((0, 4 / 6, 1 / 3, 3 / 3))


def test_rates_of_claims_that_there_are_not_are_0() -> None:
    claims = make_claims(np.array([[0.4, 0.6]]), np.array([1]), [1, 2])

    assert rates_at(claims, 0.7, np.ones(1)) == (1, 1, 1, 0)
    assert rates_at(claims, 0.7, np.zeros(1)) == (0, 0, 0, 0)


@every_draw
@pytest.mark.parametrize("prevalence", [*PREVALENCES, 0.5])
def test_precision_is_scikit_learns_of_claims_of_that_prevalence(
    prevalence: float, seed: int, digits: int
) -> None:
    claims = drawn_claims(seed, digits=digits)
    wrong = ~claims.right
    weights = np.where(wrong, prevalence / wrong.sum(), (1 - prevalence) / (~wrong).sum())

    for threshold in (0.05, 0.15, 0.3):
        rates = rates_at(claims, threshold, np.ones(40))
        expected = sklearn.metrics.precision_score(
            wrong, claims.scores < threshold, sample_weight=weights, zero_division=0
        )
        found = precision(rates.found, rates.false_alarms, prevalence)
        assert float(found) == pytest.approx(expected, abs=1e-12)


def test_precision_worked_by_hand() -> None:
    # Of 1000 bins 10 are wrong, of which 5 are found, and of the other 990 a tenth are alarms.
    assert float(precision(0.5, 0.1, 0.01)) == pytest.approx(5 / (5 + 99))
    assert float(precision(0.5, 0.0, 0.01)) == 1
    assert float(precision(0.0, 0.5, 0.01)) == 0
    # No alarm.
    assert float(precision(0.0, 0.0, 0.01)) == 0
    found = precision(np.array([0.5, 0.0]), np.array([0.1, 0.0]), 0.01)
    np.testing.assert_allclose(found, [5 / 104, 0])


def test_the_verification_table_has_the_rates_of_each_threshold() -> None:
    claims = drawn_claims(0)

    table = verification_table(claims, {"chosen": 0.12, "5%": 0.3})

    assert table.columns.tolist() == ["alarms", "threshold", *Rates._fields]
    assert table["alarms"].tolist() == ["chosen", "5%"]
    for row, threshold in zip(table.to_numpy(), (0.12, 0.3), strict=True):
        assert row[1:].tolist() == [threshold, *rates_at(claims, threshold, np.ones(40))]


def test_the_precision_table_says_how_many_bins_to_look_at() -> None:
    verification = pd.DataFrame(
        {
            "alarms": ["chosen", "none"],
            "threshold": [0.2, 0.0],
            "false_alarms": [0.1, 0.0],
            "found": [0.5, 0.0],
            "found_off_by_one": [0.4, 0.0],
            "found_off_by_more": [0.8, 0.0],
        }
    )

    table = precision_table(verification, 1000)

    columns = ["alarms", "wrong_records", "found", "precision", "bins_per_find"]
    assert table.columns.tolist() == columns
    assert table["alarms"].tolist() == ["chosen"] * 3 + ["none"] * 3
    assert table["wrong_records"].tolist() == [0.001, 0.01, 0.05] * 2
    assert table["found"].tolist() == [0.5] * 3 + [0.0] * 3
    # For 0.5 and 5 and 25 found of 1000 bins.
    looks = [(0.5 + 99.9) / 0.5, (5 + 99) / 5, (25 + 95) / 25]
    assert table["bins_per_find"].tolist() == pytest.approx([*looks, *[np.inf] * 3])
    shares = [1 / look for look in looks]
    assert table["precision"].tolist() == pytest.approx([*shares, 0, 0, 0])


def test_no_false_alarm_yet_is_no_proof_that_there_are_none() -> None:
    rates = {"false_alarms": 0.0, "found": 0.5, "found_off_by_one": 0.5, "found_off_by_more": 0.5}
    verification = pd.DataFrame([{"alarms": "chosen", "threshold": 0.2} | rates])

    table = precision_table(verification, 300)

    # Of 1000 records 1 is wrong, and found in half of the cases; of 999 right ones 1 in 100 may be.
    assert table["precision"].iloc[0] == pytest.approx(0.5 / (0.5 + 9.99))
    # With fewer right claims than 3 anything may be.
    assert precision_table(verification, 2)["precision"].iloc[0] == pytest.approx(0.5 / 999.5)


@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_found_at_round_false_alarms_is_on_scikit_learns_curve(*, weighted: bool) -> None:
    claims = drawn_claims(3, 400, 15)
    weights = np.random.default_rng(3).uniform(0.1, 3, 400) if weighted else np.ones(400)

    metrics = roc_metrics(claims, weights)

    false_alarms, found, _ = sklearn.metrics.roc_curve(
        ~claims.right,
        -claims.scores,
        sample_weight=weights[claims.bins],
        drop_intermediate=False,
    )
    for share in (0.01, 0.05, 0.10):
        most = found[false_alarms <= share].max()
        assert metrics[f"found_at_{100 * share:.0f}"] == pytest.approx(most)


def curve_points(claims: Claims, bins: int) -> set[tuple[float, float]]:
    curve = (values.tolist() for values in roc_curve(claims, np.ones(bins)))
    return set(zip(*curve, strict=True))


@pytest.mark.parametrize(("bins", "digits"), [(3, 15), (40, 1), (40, 15), (5000, 15), (5000, 3)])
def test_the_table_of_the_roc_curve_has_points_of_it_from_end_to_end(
    bins: int, digits: int
) -> None:
    claims = drawn_claims(1, bins, digits)

    table = roc_table(claims)

    assert table.columns.tolist() == ["false_alarms", "found"]
    points = list(table.itertuples(index=False, name=None))
    curve = curve_points(claims, bins)
    assert set(points) <= curve
    assert len(set(points)) == len(points) <= 1000
    # From what is found without a false alarm to the end, always up and to the right.
    assert points[0][0] == 0
    assert max(point for point in curve if point[0] == 0) in points
    assert points[-1] == (1, 1)
    assert table["false_alarms"].is_monotonic_increasing
    assert table["found"].is_monotonic_increasing


def test_the_table_of_the_roc_curve_is_dense_where_few_alarm() -> None:
    claims = drawn_claims(2, 5000)

    table = roc_table(claims)

    area = np.trapezoid(table["found"], table["false_alarms"])
    assert area == pytest.approx(roc_metrics(claims, np.ones(5000))["auroc"], abs=1e-3)
    steps = table["false_alarms"].diff().iloc[1:]
    assert steps.max() < 0.006
    # 5000 right claims: nearly each of the first ones is a point.
    assert (table["false_alarms"] < 0.002).sum() >= 10
    assert (table["false_alarms"] < 0.01).sum() > 30
