"""Intervals and paired tests, compared with SciPy, simulations and results worked by hand."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, binomtest, bootstrap, norm

from stages.scoring.bootstrap import group_weights, intervals, mcnemar

Floats = NDArray[np.float64]
GROUPS = ["00001", "00001", "00003", "00100", "100", "00001", "00100", "00008"]


def mean_of(values: Floats) -> Callable[[Floats], Mapping[str, float]]:
    return lambda weights: {"mean": float(np.average(values, weights=weights))}


def names(number: int) -> list[str]:
    """Names of groups, each for one bin."""
    return [f"{bin_number:05d}" for bin_number in range(number)]


def test_a_sample_has_as_many_groups_as_there_are_with_all_their_bins() -> None:
    samples = list(group_weights(GROUPS, 50))

    assert len(samples) == 50
    for weights in samples:
        assert weights.shape == (8,)
        of_group = dict(zip(GROUPS, weights, strict=True))
        assert [of_group[group] for group in GROUPS] == weights.tolist()
        # There are five groups, because 00100 and 100 are different.
        assert sum(of_group.values()) == len(of_group) == 5
        assert all(times == int(times) >= 0 for times in of_group.values())


def test_each_group_is_sampled_as_often_as_by_chance() -> None:
    weights = np.array(list(group_weights(names(10), 4000)))

    # The binomial distribution of 10 draws with probability 1/10.
    for times in range(4):
        expected = binom.pmf(times, 10, 0.1)
        np.testing.assert_allclose((weights == times).mean(axis=0), expected, atol=0.04)


def test_samples_are_the_same_each_time_and_differ_from_each_other() -> None:
    first, again = (np.array(list(group_weights(GROUPS, 20))) for _ in range(2))

    np.testing.assert_array_equal(first, again)
    assert len(np.unique(first, axis=0)) > 10
    # The first of more samples are the same.
    np.testing.assert_array_equal(np.array(list(group_weights(GROUPS, 30)))[:20], first)


def test_intervals_are_quantiles_of_plainly_resampled_bins() -> None:
    values = np.arange(8.0) ** 2

    table = intervals(
        lambda weights: {
            "mean": float(np.average(values, weights=weights)),
            "bins": float(weights.sum()),
        },
        GROUPS,
        samples=300,
    )

    resampled = [np.repeat(values, weights.astype(int)) for weights in group_weights(GROUPS, 300)]
    assert table.columns.tolist() == ["metric", "value", "low", "high"]
    assert table["metric"].tolist() == ["mean", "bins"]
    assert table["value"].tolist() == [values.mean(), 8]
    for column, tail in (("low", 0.025), ("high", 0.975)):
        means, sizes = [some.mean() for some in resampled], [len(some) for some in resampled]
        expected = [np.quantile(means, tail), np.quantile(sizes, tail)]
        assert table[column].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_without_siblings_an_interval_is_scipys(seed: int) -> None:
    values = np.random.default_rng(seed).gamma(2, size=150)

    (row,) = intervals(mean_of(values), names(150), samples=2000).to_dict("records")

    expected = bootstrap(
        (values,), np.mean, method="percentile", n_resamples=5000, rng=seed
    ).confidence_interval
    error = values.std() / 150**0.5
    assert row["value"] == values.mean()
    # This is several times the noise of 2000 samples, and less than a tenth of the interval.
    assert row["low"] == pytest.approx(expected.low, abs=0.3 * error)
    assert row["high"] == pytest.approx(expected.high, abs=0.3 * error)
    half = norm.ppf(0.975) * error
    assert (row["high"] - row["low"]) / 2 == pytest.approx(half, rel=0.15)


def siblings_alike(seed: int, groups: int = 40, size: int = 4) -> tuple[Floats, list[str]]:
    """Values around 0 that are nearly the same for all bins of a group."""
    chance = np.random.default_rng(seed)
    values = np.repeat(chance.normal(size=groups), size) + chance.normal(0, 0.1, groups * size)
    return values, [f"{bin_number // size:05d}" for bin_number in range(groups * size)]


def width(values: Floats, groups: list[str]) -> float:
    table = intervals(mean_of(values), groups, samples=500)
    return float((table["high"] - table["low"]).iloc[0])


def holds_0(values: Floats, groups: list[str]) -> bool:
    (row,) = intervals(mean_of(values), groups, samples=100).to_dict("records")
    return bool(row["low"] <= 0 <= row["high"])


def test_siblings_that_are_alike_make_an_interval_wider() -> None:
    values, groups = siblings_alike(0)

    # Four equal bins count as one, so the standard error is twice as large.
    assert width(values, groups) == pytest.approx(2 * width(values, names(160)), rel=0.15)
    # Siblings that have nothing in common leave the interval as it is.
    mixed = np.random.default_rng(1).permutation(values)
    assert width(mixed, groups) == pytest.approx(width(mixed, names(160)), rel=0.2)


def test_the_truth_is_in_about_95_of_100_intervals() -> None:
    held = [holds_0(*siblings_alike(seed)) for seed in range(100)]

    # A percentile interval of 40 groups is a little too narrow, and 100 intervals vary by 2%.
    assert 0.88 <= np.mean(held) <= 0.98


def rights(both: int, first: int, second: int, neither: int) -> list[NDArray[np.bool_]]:
    """The bins on which each of two classifiers is right, given the number of each kind."""
    kinds = [(True, True)] * both + [(True, False)] * first
    kinds += [(False, True)] * second + [(False, False)] * neither
    table = np.random.default_rng(0).permutation(np.array(kinds))
    return [table[:, 0], table[:, 1]]


@pytest.mark.parametrize(
    ("first", "second", "p_value"),
    [
        # The probability that at most one of 6 coins shows one side: 2 * (1 + 6) / 64.
        (1, 5, 14 / 64),
        (5, 1, 14 / 64),
        (0, 5, 2 / 32),
        (0, 1, 1.0),
        (3, 3, 1.0),
        (0, 0, 1.0),
        # 2 * (1 + 10 + 45) / 1024
        (2, 8, 112 / 1024),
        *(
            (*pair, binomtest(pair[0], sum(pair)).pvalue)
            for pair in [(40, 60), (12, 31), (300, 250)]
        ),
    ],
)
def test_mcnemar_by_hand_and_by_scipy(first: int, second: int, p_value: float) -> None:
    found = mcnemar(*rights(30, first, second, 11))

    assert found[:2] == (first, second)
    assert found.p_value == pytest.approx(p_value, rel=1e-9)
    # Bins on which both are right or both are wrong do not matter.
    assert mcnemar(*rights(1, first, second, 200)) == found
