"""Claims about bins: the count in a bin's record, and the counts that wrong records would have.

Records that are wrong in the data itself count as right, which makes every rate look a little worse
than it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stages.networks.calibration import Counts, Floats, positions_of


@dataclass(frozen=True)
class Claims:
    """Claims in the order of their scores, lowest first, one entry for each.

    The score of a claim is the probability of the claimed count. `bins` has the positions of their
    bins, `columns` those of the claimed counts among the labels, and `errors` how many items they
    are off. `weights` is how often each is made: once if it is right, and once per bin in all if it
    is wrong.
    """

    bins: Counts
    columns: Counts
    errors: Counts
    scores: Floats
    weights: Floats

    @property
    def right(self) -> NDArray[np.bool_]:
        right: NDArray[np.bool_] = self.errors == 0
        return right

    def off_by_at_most(self, items: int) -> "Claims":
        near = self.errors <= items
        return Claims(*(values[near] for values in vars(self).values()))


def make_claims(probabilities: Floats, actual: Counts, labels: list[int], wrong: Floats) -> Claims:
    """The claims about bins with `probabilities` [bins, labels] and true counts `actual`.

    `wrong` [bins, labels] is how often each wrong count is claimed.
    """
    errors = np.abs(np.array(labels) - actual[:, None])
    weights = np.where(errors == 0, 1.0, wrong)
    bins, columns = np.nonzero(weights)
    order = np.argsort(probabilities[bins, columns], kind="stable")
    bins, columns = bins[order], columns[order]
    chosen = bins, columns
    return Claims(bins, columns, errors[chosen], probabilities[chosen], weights[chosen])


def uniform_errors(actual: Counts, labels: list[int]) -> Floats:
    """How often each wrong count is claimed of each bin if all are equally frequent."""
    return _in_shares(np.array(labels) != actual[:, None])


def pick_errors(
    ids: Sequence[str],
    groups: Sequence[str],
    actual: Counts,
    labels: list[int],
    differences: pd.DataFrame,
) -> Floats:
    """How often each wrong count is claimed of each bin if picks were not booked: [bins, labels].

    A record that misses a pick is that of the bin's sibling. So the counts of its siblings are
    claimed of a bin, or, of a bin without any, counts that differ from its own as siblings do:
    `differences` is the table of sibling_differences. If it has none of these, all counts are.
    """
    first, second = adjacent_siblings(ids, groups)
    columns = positions_of(actual, labels)
    claimed = np.zeros((len(actual), len(labels)))
    np.add.at(claimed, (first, columns[second]), 1)
    np.add.at(claimed, (second, columns[first]), 1)
    # Siblings with equal counts, after a pick and a stow, say nothing about wrong counts.
    claimed[np.arange(len(actual)), columns] = 0
    alone = ~claimed.any(axis=1)
    claimed[alone] = errors_like_siblings(actual[alone], labels, differences)
    return _in_shares(claimed)


def errors_like_siblings(actual: Counts, labels: list[int], differences: pd.DataFrame) -> Floats:
    """How often each wrong count is claimed of bins, as `differences` says: [bins, labels]."""
    off = np.abs(np.array(labels) - actual[:, None])
    shares = differences.set_index("items_off")["share"].reindex(
        range(np.ptp(labels) + 1), fill_value=0
    )
    claimed = shares.to_numpy()[off]
    none = ~claimed.any(axis=1)
    claimed[none] = uniform_errors(actual[none], labels)
    return _in_shares(claimed)


def sibling_differences(
    ids: Sequence[str], groups: Sequence[str], quantities: Counts
) -> pd.DataFrame:
    """How many items siblings differ by: items_off (1 and up), pairs and share.

    A pair is two bins of a group that follow each other in the order of their ids. Pairs with equal
    counts are left out.
    """
    first, second = adjacent_siblings(ids, groups)
    off = np.abs(quantities[first] - quantities[second])
    items_off, pairs = np.unique(off[off > 0], return_counts=True)
    shares = pairs / max(pairs.sum(), 1)
    return pd.DataFrame({"items_off": items_off, "pairs": pairs, "share": shares})


def adjacent_siblings(ids: Sequence[str], groups: Sequence[str]) -> tuple[Counts, Counts]:
    """The positions of the first and of the second bin of each pair of adjacent siblings."""
    bins = pd.DataFrame({"group": groups, "digits": [len(one) for one in ids], "id": ids})
    order = bins.sort_values(["group", "digits", "id"]).index.to_numpy()
    siblings = bins["group"].to_numpy()[order]
    adjacent = siblings[1:] == siblings[:-1]
    return order[:-1][adjacent], order[1:][adjacent]


def _in_shares(rows: NDArray[np.generic]) -> Floats:
    """Each row divided by its sum; a row of zeros stays."""
    values = rows.astype(np.float64)
    shares: Floats = values / np.maximum(values.sum(axis=1, keepdims=True), 1e-12)
    return shares
