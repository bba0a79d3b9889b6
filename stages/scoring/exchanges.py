"""Records claimed of other bins, so that they are wrong: picks and swaps.

Each record serves equally often as a right one, of its own bin, and as a wrong one. So nothing in a
record itself gives away whether it is right.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.networks.calibration import Counts
from stages.scoring.claims import adjacent_siblings


class Exchanges(NamedTuple):
    """Pairs of bins, as positions: the record of `others` is claimed of the photograph of `bins`.

    The right claim is that of the own record. A bin may be in two pairs.
    """

    bins: Counts
    others: Counts


def picks(ids: Sequence[str], groups: Sequence[str], actual: Counts) -> Exchanges:
    """Records that miss a pick: adjacent siblings with different counts exchange theirs."""
    first, second = adjacent_siblings(ids, groups)
    changed = actual[first] != actual[second]
    first, second = first[changed], second[changed]
    return Exchanges(np.concatenate([first, second]), np.concatenate([second, first]))


def swaps(ids: Sequence[str], actual: Counts) -> Exchanges:
    """Items in the wrong bin: bins with equal counts pass their records on in a circle.

    The circle is drawn at random, and is the same for the same bins in any order. A bin whose count
    no other bin has is left out.
    """
    by_id = np.argsort(np.array(ids, dtype=str), kind="stable")
    chance = np.random.default_rng(0)
    bins: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    others = bins.copy()
    for count in np.unique(actual):
        circle = chance.permutation(by_id[actual[by_id] == count])
        if len(circle) > 1:
            bins.append(circle)
            others.append(np.roll(circle, 1))
    return Exchanges(np.concatenate(bins), np.concatenate(others))
