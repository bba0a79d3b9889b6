"""Which wrong counts are claimed of a bin, worked by hand and counted on the real records."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from stages.scoring.claims import (
    make_claims,
    pick_errors,
    sibling_differences,
    uniform_errors,
)
from stages.subset import with_groups

LABELS = [1, 2, 3, 4, 5]
# 00001 to 00003 are siblings, as are 99999 and 100000; 7 is alone.
IDS = ["00002", "100000", "00001", "7", "00003", "99999"]
GROUPS = ["00001", "99999", "00001", "7", "00001", "99999"]
COUNTS = np.array([2, 4, 3, 3, 2, 1])
# By one item in three quarters of the pairs.
DIFFERENCES = pd.DataFrame({"items_off": [1, 2], "pairs": [30, 10], "share": [0.75, 0.25]})


def test_each_wrong_count_is_as_frequent_as_any_other() -> None:
    wrong = uniform_errors(np.array([1, 3]), [1, 3, 5])

    assert wrong.tolist() == [[0, 0.5, 0.5], [0.5, 0, 0.5]]


def test_the_records_of_siblings_are_claimed_and_otherwise_counts_that_differ_as_theirs() -> None:
    wrong = pick_errors(IDS, GROUPS, COUNTS, LABELS, DIFFERENCES)

    expected = {
        # Its neighbours are 00001 with 3 items, and 00003 with 2, which says nothing.
        "00002": [0, 0, 1, 0, 0],
        "00001": [0, 1, 0, 0, 0],
        "100000": [1, 0, 0, 0, 0],
        "99999": [0, 0, 0, 1, 0],
        # This bin has no sibling, and this one's only neighbour has as many items.
        "7": [0.125, 0.375, 0, 0.375, 0.125],
        "00003": [0.75 / 1.75, 0, 0.75 / 1.75, 0.25 / 1.75, 0],
    }
    for bin_id, shares in zip(IDS, wrong, strict=True):
        assert shares.tolist() == pytest.approx(expected[bin_id]), bin_id


def test_a_bin_between_two_siblings_has_the_records_of_both() -> None:
    ids = ["00001", "00002", "00003"]

    wrong = pick_errors(ids, ["00001"] * 3, np.array([1, 2, 4]), LABELS, DIFFERENCES)

    assert wrong[1].tolist() == [0.5, 0, 0, 0.5, 0]


def test_without_any_siblings_all_wrong_counts_are_claimed() -> None:
    none = sibling_differences(["1", "2"], ["1", "2"], np.array([1, 2]))

    wrong = pick_errors(["1", "2"], ["1", "2"], np.array([1, 2]), LABELS, none)

    assert none.columns.tolist() == ["items_off", "pairs", "share"]
    assert wrong.tolist() == uniform_errors(np.array([1, 2]), LABELS).tolist()


def test_all_wrong_counts_are_claimed_of_a_bin_whose_count_no_siblings_difference_reaches() -> None:
    off_by_one = sibling_differences(["1", "2"], ["1", "1"], np.array([0, 1]))

    wrong = pick_errors(["3", "4"], ["3", "4"], np.array([0, 5]), [0, 1, 5], off_by_one)

    assert wrong.tolist() == [[0, 1, 0], [0.5, 0.5, 0]]


def test_differences_are_counted_between_neighbours() -> None:
    table = sibling_differences(IDS, GROUPS, COUNTS)

    # 3 and 2; 2 and 2, which do not differ; 1 and 4.
    assert table.to_numpy().tolist() == [[1, 1, 0.5], [3, 1, 0.5]]


def test_real_siblings_differ_by_one_item_in_four_pairs_of_five(abid_index: pa.Table) -> None:
    bins = with_groups(abid_index, LABELS).to_pandas()
    bins = bins[bins["quantity"].isin(LABELS)]
    ids, groups = bins["id"].tolist(), bins["group"].tolist()

    table = sibling_differences(ids, groups, bins["quantity"].to_numpy())

    assert table["share"].round(3).tolist() == [0.8, 0.151, 0.037, 0.013]
    assert table["pairs"].sum() == 2292


@pytest.mark.parametrize("labels", [LABELS, [5, 2, 4, 1, 3]], ids=str)
def test_claims_are_in_the_order_of_their_scores(labels: list[int]) -> None:
    chance = np.random.default_rng(0)
    probabilities, actual = chance.dirichlet(np.ones(5), 40).round(2), chance.choice(labels, 40)
    wrong = uniform_errors(actual, labels)
    wrong[7] = 0

    claims = make_claims(probabilities, actual, labels, wrong)

    expected = sorted(
        (float(probabilities[position, number]), position, number, abs(label - int(count)))
        for position, count in enumerate(actual)
        for number, label in enumerate(labels)
        # A bin of which no wrong count is claimed has its right claim only.
        if position != 7 or label == count
    )
    found = [claims.scores.tolist(), claims.bins.tolist(), claims.columns.tolist()]
    assert list(zip(*found, claims.errors.tolist(), strict=True)) == expected
    assert claims.right.sum() == len(actual)
    assert set(claims.weights[claims.right]) == {1.0}
    of_wrong = np.bincount(claims.bins, np.where(claims.right, 0, claims.weights))
    assert np.delete(of_wrong, 7) == pytest.approx(1)


def test_claims_that_are_nearly_right() -> None:
    actual = np.array([1, 3])
    claims = make_claims(np.eye(2, 3) + 0.1, actual, [1, 2, 3], uniform_errors(actual, [1, 2, 3]))

    near = claims.off_by_at_most(1)

    assert sorted(zip(near.bins.tolist(), near.errors.tolist(), strict=True)) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
