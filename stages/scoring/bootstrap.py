"""How much of a number is chance: intervals by bootstrap, and paired tests."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import bdtr
from tqdm import tqdm

Floats = NDArray[np.float64]
SAMPLES = 1000
CONFIDENCE = 0.95


class PairedTest(NamedTuple):
    """On how many bins only one of two is right, and the p-value of that if both are as good."""

    only_first: int
    only_second: int
    p_value: float


def group_weights(groups: Sequence[str], samples: int = SAMPLES) -> Iterator[Floats]:
    """Yield samples of whole groups, sampled with replacement: how often each has each bin, [bins].

    Whole groups, since siblings are not independent: a bootstrap of bins would give intervals that
    are too narrow (the cluster bootstrap; Davison and Hinkley, Bootstrap Methods, 1997, 3.8). The
    samples are the same each time.
    """
    _, places = np.unique(np.array(groups, dtype=str), return_inverse=True)
    number = places.max() + 1
    chance = np.random.default_rng(0)
    for _ in range(samples):
        sampled = np.bincount(chance.integers(number, size=number), minlength=number)
        yield sampled[places].astype(np.float64)


def intervals(
    statistics: Callable[[Floats], Mapping[str, float]],
    groups: Sequence[str],
    samples: int = SAMPLES,
    centred: Sequence[str] = (),
) -> pd.DataFrame:
    """Each statistic's value with its 95% percentile interval: metric, value, low and high.

    `statistics` computes them from bins with the weights it is given. The samples of a squared
    distance are larger than its value on average, since resampling adds noise before the square is
    taken. Name such statistics in `centred`, which moves the mean of their samples to the value.
    """
    values = statistics(np.ones(len(groups)))
    sampled = group_weights(groups, samples)
    progress = tqdm(sampled, "bootstrap", total=samples, disable=None, leave=False)
    resampled = pd.DataFrame([dict(statistics(weights)) for weights in progress])
    for name in centred:
        resampled[name] += values[name] - resampled[name].mean()
    tail = (1 - CONFIDENCE) / 2
    low, high = resampled.quantile(tail), resampled.quantile(1 - tail)
    return (
        pd.DataFrame({"value": values, "low": low, "high": high})
        .rename_axis("metric")
        .loc[list(values)]
        .reset_index()
    )


def mcnemar(first_right: NDArray[np.bool_], second_right: NDArray[np.bool_]) -> PairedTest:
    """McNemar's exact test of two classifiers on the same bins.

    McNemar, Note on the sampling error of the difference between correlated proportions,
    Psychometrika 1947. It treats bins as independent, which the bootstrap by group does not.
    """
    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    # Both tails of a fair coin. scipy.stats.binomtest says the same, and takes a second to import.
    tail = float(bdtr(min(only_first, only_second), only_first + only_second, 0.5))
    return PairedTest(only_first, only_second, min(1.0, 2 * tail))
