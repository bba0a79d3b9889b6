"""Three sets without siblings across sets, for synthetic bins and for real records."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pandas as pd
import pyarrow as pa
import pytest

from stages.formats.shards import Reject, write_rejects, write_table
from stages.runtime.errors import UserError
from stages.runtime.params import Split, Subset
from stages.sampling.splitting import apportion, count_leaks, split
from stages.split import main
from stages.subset import sample, with_groups
from tests.conftest import sibling_pairs, write_params

QUANTITIES = [1, 2, 3, 4, 5]
WEIGHTS = [12, 22, 26, 23, 17]
SETS = ["train", "validation", "test"]
By = Literal["group", "image"]


def settings(train: int, test: int, seed: int = 0, by: By = "group", validation: int = 90) -> Split:
    return Split(
        train=train, validation=validation, test=test, by=by, file=None, seed=seed, corrections=None
    )


def synthetic_bins(count: int, seed: int = 0) -> pd.DataFrame:
    """Bins in groups of one to four, in which neighbours differ in quantity."""
    chance = random.Random(seed)
    rows: list[tuple[str, int, str]] = []
    while len(rows) < count:
        first = f"{len(rows) + 1:05d}"
        for _ in range(min(chance.choice([1, 1, 2, 2, 3, 4]), count - len(rows))):
            quantity = chance.choices(QUANTITIES, WEIGHTS)[0]
            rows.append((f"{len(rows) + 1:05d}", quantity, first))
    return pd.DataFrame(rows, columns=["id", "quantity", "group"])


@pytest.fixture(scope="module")
def bins() -> pd.DataFrame:
    return synthetic_bins(2000)


@pytest.fixture(scope="module")
def real_bins(abid_index: pa.Table) -> pd.DataFrame:
    """All real bins with one to five items."""
    fitting = sum(quantity in QUANTITIES for quantity in abid_index["quantity"].to_pylist())
    params = Subset(quantities=QUANTITIES, bins=fitting, order="listing", seed=0, ids=None)
    table: pd.DataFrame = sample(with_groups(abid_index, QUANTITIES), params).to_pandas()
    return table


@pytest.fixture(scope="module")
def real_pairs(abid_records: dict[str, bytes]) -> list[tuple[str, str]]:
    return sibling_pairs(abid_records)


def ids_of(sets: pd.DataFrame, name: str) -> set[str]:
    return set(sets.loc[sets["set"] == name, "id"])


def sizes(sets: pd.DataFrame) -> list[int]:
    """The sizes of train, validation and test."""
    return [len(ids_of(sets, name)) for name in SETS]


def shares(bins: pd.DataFrame, ids: set[str]) -> pd.Series:
    chosen: pd.Series = bins.loc[bins["id"].isin(ids), "quantity"]
    return chosen.value_counts(normalize=True).sort_index()


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [(1710, 90, 200), (700, 300, 500), (1997, 2, 1), (200, 300, 333), (27, 3, 7)],
)
@pytest.mark.parametrize("by", ["group", "image"])
def test_each_set_has_exactly_its_size(
    bins: pd.DataFrame, train: int, validation: int, test: int, by: By
) -> None:
    sets = split(bins, set(), settings(train, test, by=by, validation=validation))
    assert sizes(sets) == [train, validation, test]


def test_three_bins_are_one_set_each() -> None:
    three = pd.DataFrame({"id": ["1", "2", "3"], "quantity": 1, "group": ["1", "2", "3"]})
    assert sizes(split(three, set(), settings(1, 1, validation=1))) == [1, 1, 1]


def test_the_groups_are_those_of_the_subset(bins: pd.DataFrame) -> None:
    groups = dict(zip(bins["id"], bins["group"], strict=True))
    for by in ("group", "image"):
        sets = split(bins, set(), settings(1000, 200, by=by))
        assert sets["group"].tolist() == [groups[bin_id] for bin_id in sets["id"]]


@pytest.mark.parametrize("validation", [85, 680])
@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_divided(bins: pd.DataFrame, seed: int, validation: int) -> None:
    sets = split(bins, set(), settings(1700 - validation, 200, seed, validation=validation))
    assert sets.groupby("group")["set"].nunique().max() == 1


def test_the_published_protocol_divides_groups(bins: pd.DataFrame) -> None:
    sets = split(bins, set(), settings(1200, 200, by="image", validation=500))
    assert sets.groupby("group")["set"].nunique().max() == 3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("by", ["group", "image"])
@pytest.mark.parametrize(("train", "test"), [(1620, 200), (810, 300)])
def test_the_quantities_have_the_same_shares_in_all_sets(
    bins: pd.DataFrame, train: int, test: int, by: By, seed: int
) -> None:
    sets = split(bins, set(), settings(train, test, seed, by, train // 9))
    everywhere = shares(bins, set(bins["id"]))
    for name in SETS:
        found = shares(bins, ids_of(sets, name))
        assert (found - everywhere).abs().max() <= 3 / len(ids_of(sets, name)) + 0.002


def test_by_image_the_quantities_are_apportioned_exactly(bins: pd.DataFrame) -> None:
    sets = split(bins, set(), settings(1710, 200, by="image"))
    for name, size in (("test", 200), ("validation", 90)):
        found = Counter(bins.loc[bins["id"].isin(ids_of(sets, name)), "quantity"])
        assert found == apportion(size, Counter(bins["quantity"]))


def test_bins_are_listed_once_sorted_by_id(bins: pd.DataFrame) -> None:
    sets = split(bins, set(), settings(1000, 200))
    assert list(sets.columns) == ["id", "set", "group"]
    assert sets["id"].is_monotonic_increasing
    assert sets["id"].is_unique


def test_the_order_of_the_rows_does_not_matter(bins: pd.DataFrame) -> None:
    shuffled = bins.sample(frac=1, random_state=1)
    one, two = (split(table, set(), settings(1000, 200)) for table in (bins, shuffled))
    assert one.to_numpy().tolist() == two.to_numpy().tolist()


@pytest.mark.parametrize("name", ["validation", "test"])
def test_another_seed_gives_another_set(bins: pd.DataFrame, name: str) -> None:
    seeds = [split(bins, set(), settings(1620, 200, seed, validation=180)) for seed in range(3)]
    found = [ids_of(sets, name) for sets in seeds]
    for one, two in [(0, 1), (0, 2), (1, 2)]:
        assert len(found[one] & found[two]) < 100


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("by", ["group", "image"])
def test_another_number_of_validation_bins_moves_none_of_test(
    bins: pd.DataFrame, by: By, seed: int
) -> None:
    found = [
        split(bins, set(), settings(1500 - validation, 200, seed, by, validation))
        for validation in (15, 75, 450, 1350)
    ]
    assert [sizes(sets)[1] for sets in found] == [15, 75, 450, 1350]
    for smaller, larger in pairwise(found):
        assert ids_of(smaller, "test") == ids_of(larger, "test")


def test_another_size_of_test_hardly_moves_validation(bins: pd.DataFrame) -> None:
    # With a common order, validation would be the groups that follow those of test.
    small, large = (
        ids_of(split(bins, set(), settings(1000, test)), "validation") for test in (100, 300)
    )
    assert len(small & large) > 60


def test_unusable_bins_are_in_no_set_and_hardly_move_the_others(bins: pd.DataFrame) -> None:
    unusable = set(bins["id"][::100])
    before = split(bins, set(), settings(1520, 200))
    after = split(bins, unusable, settings(1520, 200))
    assert not set(after["id"]) & unusable
    assert sizes(after) == [1520, 90, 200]
    kept = ids_of(before, "test") & ids_of(after, "test")
    assert len(kept) > 170


def test_train_has_the_rest_if_too_few_bins_are_usable(bins: pd.DataFrame) -> None:
    sets = split(bins, set(bins["id"][:50]), settings(1710, 200))
    assert sizes(sets) == [1660, 90, 200]


@pytest.mark.parametrize(("train", "test"), [(1711, 200), (2000, 1), (1, 2000)])
def test_more_bins_than_there_are_are_refused(bins: pd.DataFrame, train: int, test: int) -> None:
    with pytest.raises(UserError) as caught:
        split(bins, set(), settings(train, test))
    for part in (f"split.train {train}, validation 90 and test {test}", "2000 bins", "subset.bins"):
        assert part in str(caught.value)


def test_a_test_set_that_leaves_nothing_to_train_is_refused(bins: pd.DataFrame) -> None:
    with pytest.raises(UserError, match=r"test 200 leave nothing to train: only 100 bins"):
        split(bins, set(bins["id"][100:]), settings(1000, 200))


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    ("groups", "train", "test", "validation", "problem"),
    [
        ([10], 6, 2, 2, "test: no remaining sibling group fits into 2 bins"),
        ([1, 1, 2], 1, 1, 1, "train: no remaining sibling group fits into 1 bins"),
        ([3, 3, 3], 4, 3, 2, "validation: no remaining sibling group fits into 2 bins"),
        ([3, 4], 1, 3, 3, "validation: no remaining sibling group fits into 3 bins"),
    ],
)
def test_a_set_that_no_group_fits_into_is_a_readable_error(
    groups: list[int], train: int, test: int, validation: int, problem: str
) -> None:
    labels = [f"{group:05d}" for group, size in enumerate(groups) for _ in range(size)]
    rows = [
        {"id": f"{position:05d}", "quantity": position % 2 + 1, "group": label}
        for position, label in enumerate(labels)
    ]
    write_table(Path("data/subset.parquet"), pa.Table.from_pylist(rows))
    write_rejects(Path("data/quarantine.csv"), [])
    write_params({"split.train": train, "split.test": test, "split.validation": validation})
    with pytest.raises(UserError) as caught:
        main()
    assert str(caught.value) == f"split.{problem}"
    assert not Path("data/split.csv").exists()


@pytest.mark.parametrize("size", [0, 1, 7, 99, 100])
def test_apportioned_counts_add_up_and_are_off_by_less_than_one(size: int) -> None:
    counts = Counter({1: 12, 2: 22, 3: 26, 4: 23, 5: 17})
    parts = apportion(size, counts)
    assert parts.total() == size
    for quantity, count in counts.items():
        assert abs(parts[quantity] - size * count / 100) < 1


def test_the_stage_writes_ids_as_they_are(workspace: Path) -> None:
    sizes = {"split.train": 24, "split.validation": 6, "split.test": 10}
    write_params({**sizes, "split.by": "image"})
    table = synthetic_bins(40)
    table.loc[0, ["id", "group"]] = "1102"
    write_table(workspace / "data/subset.parquet", pa.Table.from_pandas(table))
    write_rejects(workspace / "data/quarantine.csv", [Reject("00002", "no bytes")])
    summary = main()
    lines = (workspace / "data/split.csv").read_text("utf-8").splitlines()
    columns = list(zip(*(line.split(",") for line in lines), strict=True))
    groups = dict(zip(table["id"], table["group"], strict=True))
    ids = sorted(set(table["id"]) - {"00002"})
    assert list(columns[0]) == ["id", *ids]
    assert columns[1][0] == "set"
    counts = ", ".join(f"{columns[1].count(name)} {name}" for name in SETS)
    assert summary == f"{counts}; 1 unusable"
    assert list(columns[2]) == ["group", *(groups[bin_id] for bin_id in ids)]
    assert "1102,1102" in {f"{line.split(',')[0]},{line.split(',')[2]}" for line in lines}


def test_leaks_worked_by_hand() -> None:
    rows = [
        ("1", "train", "1"),
        ("2", "test", "1"),
        ("3", "test", "1"),
        ("4", "validation", "4"),
        ("5", "test", "4"),
        # Siblings that are both in test are not a leak.
        ("6", "test", "6"),
        ("7", "test", "6"),
        # Nor is a twin with the same number.
        ("00006", "train", "00006"),
    ]
    sets = pd.DataFrame(rows, columns=["id", "set", "group"])
    assert count_leaks(sets) == {"test_bins": 5, "with_sibling_seen": 3}


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("by", ["group", "image"])
def test_the_leak_of_both_protocols_is_written_whichever_is_chosen(
    bins: pd.DataFrame, by: By
) -> None:
    write_table(Path("data/subset.parquet"), pa.Table.from_pandas(bins))
    write_rejects(Path("data/quarantine.csv"), [])
    write_params({"split.train": 1710, "split.validation": 90, "split.test": 200, "split.by": by})
    main()
    leaks = json.loads(Path("data/split.json").read_text("utf-8"))
    by_image = split(bins, set(), settings(1710, 200, by="image"))
    others = by_image[by_image["set"] != "test"]
    leaking = by_image[(by_image["set"] == "test") & by_image["group"].isin(others["group"])]
    assert leaks == {
        "group": {"test_bins": 200, "with_sibling_seen": 0},
        "image": {"test_bins": 200, "with_sibling_seen": len(leaking)},
    }
    assert 100 < len(leaking) < 200


@pytest.mark.usefixtures("workspace")
def test_a_protocol_that_the_groups_do_not_allow_is_not_counted() -> None:
    # Ten siblings do not fit into a test set of two.
    rows = [{"id": f"{n:05d}", "quantity": n % 2 + 1, "group": "00000"} for n in range(10)]
    write_table(Path("data/subset.parquet"), pa.Table.from_pylist(rows))
    write_rejects(Path("data/quarantine.csv"), [])
    chosen = {"split.train": 4, "split.validation": 4, "split.test": 2}
    write_params(chosen | {"split.by": "image"})
    assert main() == "4 train, 4 validation, 2 test; 0 unusable"
    leaks = json.loads(Path("data/split.json").read_text("utf-8"))
    assert leaks == {"image": {"test_bins": 2, "with_sibling_seen": 2}}


@pytest.mark.parametrize("seed", [0, 1, 2, 7, 2**32 - 1])
def test_no_real_siblings_straddle_the_split(
    real_bins: pd.DataFrame, real_pairs: list[tuple[str, str]], seed: int
) -> None:
    sets = split(real_bins, set(), settings(5310, 662, seed, validation=590))
    assert sizes(sets) == [5310, 590, 662]
    of_bin = dict(zip(sets["id"], sets["set"], strict=True))
    pairs = [pair for pair in real_pairs if set(pair) <= set(of_bin)]
    assert len(pairs) > 1000
    assert all(of_bin[one] == of_bin[two] for one, two in pairs)


@pytest.mark.usefixtures("workspace")
def test_the_published_protocol_leaks_real_siblings_and_the_stage_says_so(
    real_bins: pd.DataFrame, real_pairs: list[tuple[str, str]]
) -> None:
    write_table(Path("data/subset.parquet"), pa.Table.from_pandas(real_bins))
    write_rejects(Path("data/quarantine.csv"), [])
    write_params(
        {"split.train": 5605, "split.validation": 295, "split.test": 662, "split.by": "image"}
    )
    main()
    sets = pd.read_csv("data/split.csv", dtype=str)
    # A sibling of a sibling counts, even through a bin with more than five items.
    first_of: dict[str, str] = {}
    for one, two in real_pairs:
        first_of[two] = first_of.get(one, one)
    groups = {bin_id: first_of.get(bin_id, bin_id) for bin_id in sets["id"]}
    test = ids_of(sets, "test")
    seen = {groups[bin_id] for bin_id in groups.keys() - test}
    leaking = sum(groups[bin_id] in seen for bin_id in test)
    assert leaking > 0.5 * len(test)
    assert json.loads(Path("data/split.json").read_text("utf-8")) == {
        "group": {"test_bins": 662, "with_sibling_seen": 0},
        "image": {"test_bins": 662, "with_sibling_seen": leaking},
    }
