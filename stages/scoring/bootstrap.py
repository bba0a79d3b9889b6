"""How much of a number is chance: bootstrap intervals and paired tests."""

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
    """The number of bins on which only one of two classifiers is right, and the p-value."""

    only_first: int
    only_second: int
    p_value: float


def group_weights(groups: Sequence[str], samples: int = SAMPLES) -> Iterator[Floats]:
    """Yield samples of whole groups, with replacement: how often each sample has each bin, [bins].

    Siblings are not independent, so a bootstrap of single bins would give intervals that are too
    narrow (the cluster bootstrap; Davison and Hinkley, Bootstrap Methods, 1997, 3.8). The samples
    are the same each time.
    """
    _, positions = np.unique(np.array(groups, dtype=str), return_inverse=True)
    number = positions.max() + 1
    chance = np.random.default_rng(0)
    for _ in range(samples):
        sampled = np.bincount(chance.integers(number, size=number), minlength=number)
        yield sampled[positions].astype(np.float64)


def intervals(
    statistics: Callable[[Floats], Mapping[str, float]],
    groups: Sequence[str],
    samples: int = SAMPLES,
    centred: Sequence[str] = (),
) -> pd.DataFrame:
    """Each statistic's value with its 95% percentile interval: metric, value, low and high.

    `statistics` computes them for bins with the given weights. The samples of a squared distance
    are larger than its value on average, because resampling adds noise before the square is taken.
    For the statistics named in `centred`, the mean of the samples is moved to the value.
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
    Psychometrika 1947. Unlike the bootstrap of groups, it treats bins as independent.
    """
    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    # Both tails of a fair coin, as in scipy.stats.binomtest, which takes a second to import.
    tail = float(bdtr(min(only_first, only_second), only_first + only_second, 0.5))
    return PairedTest(only_first, only_second, min(1.0, 2 * tail))
