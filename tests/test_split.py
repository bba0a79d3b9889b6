import random
from collections import Counter
from pathlib import Path
from typing import Literal

import pandas as pd
import pyarrow as pa
import pytest

from stages.core.command import UserError
from stages.core.params import Split, Subset
from stages.core.shards import Reject, write_rejects, write_table
from stages.split import apportion, main, split
from stages.subset import draw, with_groups
from tests.conftest import sibling_pairs, write_params

QUANTITIES = [1, 2, 3, 4, 5]
WEIGHTS = [12, 22, 26, 23, 17]


def knobs(train: int, test: int, seed: int = 0, by: Literal["group", "image"] = "group") -> Split:
    return Split(train=train, test=test, by=by, seed=seed)


def drawn_bins(count: int, seed: int = 0) -> pd.DataFrame:
    """Bins in groups of one to four, of which no two neighbours have the same quantity."""
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
    return drawn_bins(2000)


@pytest.fixture(scope="module")
def real_bins(abid_index: pa.Table) -> pd.DataFrame:
    """All real bins with one to five items."""
    fitting = sum(quantity in QUANTITIES for quantity in abid_index["quantity"].to_pylist())
    params = Subset(quantities=QUANTITIES, bins=fitting, seed=0)
    table: pd.DataFrame = draw(with_groups(abid_index), params).to_pandas()
    return table


def ids_of(sets: pd.DataFrame, name: str) -> set[str]:
    return set(sets.loc[sets["set"] == name, "id"])


def shares(bins: pd.DataFrame, ids: set[str]) -> pd.Series:
    chosen: pd.Series = bins.loc[bins["id"].isin(ids), "quantity"]
    return chosen.value_counts(normalize=True).sort_index()


@pytest.mark.parametrize(
    ("train", "test"), [(1800, 200), (1000, 500), (1, 1), (1999, 1), (500, 333)]
)
@pytest.mark.parametrize("by", ["group", "image"])
def test_both_sets_have_exactly_their_size(
    bins: pd.DataFrame, train: int, test: int, by: Literal["group", "image"]
) -> None:
    sets = split(bins, set(), knobs(train, test, by=by))
    assert sets["set"].value_counts().to_dict() == {"train": train, "test": test}


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_divided(bins: pd.DataFrame, seed: int) -> None:
    sets = split(bins, set(), knobs(1700, 200, seed)).merge(bins, on="id")
    assert sets.groupby("group")["set"].nunique().max() == 1


def test_the_published_protocol_divides_groups(bins: pd.DataFrame) -> None:
    sets = split(bins, set(), knobs(1700, 200, by="image")).merge(bins, on="id")
    assert sets.groupby("group")["set"].nunique().max() == 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("by", ["group", "image"])
@pytest.mark.parametrize(("train", "test"), [(1800, 200), (900, 300)])
def test_the_quantities_have_the_same_shares_in_both_sets(
    bins: pd.DataFrame, train: int, test: int, by: Literal["group", "image"], seed: int
) -> None:
    sets = split(bins, set(), knobs(train, test, seed, by))
    everywhere = shares(bins, set(bins["id"]))
    for name in ("train", "test"):
        found = shares(bins, ids_of(sets, name))
        assert (found - everywhere).abs().max() <= 3 / len(ids_of(sets, name)) + 0.002


def test_by_image_the_quantities_are_apportioned_exactly(bins: pd.DataFrame) -> None:
    sets = split(bins, set(), knobs(1800, 200, by="image"))
    test = Counter(bins.loc[bins["id"].isin(ids_of(sets, "test")), "quantity"])
    assert test == apportion(200, Counter(bins["quantity"]))


def test_bins_are_listed_once_sorted_by_id(bins: pd.DataFrame) -> None:
    sets = split(bins, set(), knobs(1000, 200))
    assert list(sets.columns) == ["id", "set"]
    assert sets["id"].is_monotonic_increasing
    assert sets["id"].is_unique


def test_the_order_of_the_rows_does_not_matter(bins: pd.DataFrame) -> None:
    shuffled = bins.sample(frac=1, random_state=1)
    one, two = (split(table, set(), knobs(1000, 200)) for table in (bins, shuffled))
    assert one.to_numpy().tolist() == two.to_numpy().tolist()


def test_another_seed_gives_another_test_set(bins: pd.DataFrame) -> None:
    tests = [ids_of(split(bins, set(), knobs(1800, 200, seed)), "test") for seed in range(3)]
    for one, two in [(0, 1), (0, 2), (1, 2)]:
        assert len(tests[one] & tests[two]) < 100


def test_unusable_bins_are_in_no_set_and_hardly_move_the_others(bins: pd.DataFrame) -> None:
    unusable = set(bins["id"][::100])
    before = split(bins, set(), knobs(1600, 200))
    after = split(bins, unusable, knobs(1600, 200))
    assert not set(after["id"]) & unusable
    assert after["set"].value_counts().to_dict() == {"train": 1600, "test": 200}
    kept = ids_of(before, "test") & ids_of(after, "test")
    assert len(kept) > 170


def test_where_too_few_bins_are_usable_train_has_the_rest(bins: pd.DataFrame) -> None:
    sets = split(bins, set(bins["id"][:50]), knobs(1800, 200))
    assert sets["set"].value_counts().to_dict() == {"train": 1750, "test": 200}


@pytest.mark.parametrize(("train", "test"), [(1801, 200), (2000, 1), (1, 2000)])
def test_more_than_there_is_is_refused(bins: pd.DataFrame, train: int, test: int) -> None:
    with pytest.raises(UserError) as caught:
        split(bins, set(), knobs(train, test))
    for part in (f"split.train {train}", f"split.test {test}", "2000 bins", "subset.bins"):
        assert part in str(caught.value)


def test_a_test_set_that_leaves_nothing_to_train_is_refused(bins: pd.DataFrame) -> None:
    with pytest.raises(UserError, match=r"split\.test 200 leaves nothing to train: 100 bins"):
        split(bins, set(bins["id"][100:]), knobs(1000, 200))


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    ("groups", "train", "test"),
    [([10], 8, 2), ([2, 2], 1, 3)],
    ids=["no group fits into test", "no group fits into train"],
)
def test_a_set_that_no_group_fits_into_is_a_readable_error(
    groups: list[int], train: int, test: int
) -> None:
    labels = [f"{group:05d}" for group, size in enumerate(groups) for _ in range(size)]
    rows = [
        {"id": f"{place:05d}", "quantity": place % 2 + 1, "group": label}
        for place, label in enumerate(labels)
    ]
    write_table(Path("data/subset.parquet"), pa.Table.from_pylist(rows))
    write_rejects(Path("data/quarantine.csv"), [])
    write_params({"split.train": train, "split.test": test})
    with pytest.raises(UserError, match=r"split\.t(rain|est)"):
        main()


@pytest.mark.parametrize("size", [0, 1, 7, 99, 100])
def test_apportioning_gives_all_and_at_most_one_off(size: int) -> None:
    counts = Counter({1: 12, 2: 22, 3: 26, 4: 23, 5: 17})
    parts = apportion(size, counts)
    assert parts.total() == size
    for quantity, count in counts.items():
        assert abs(parts[quantity] - size * count / 100) < 1


def test_the_stage_writes_ids_as_they_are(workspace: Path) -> None:
    write_params({"split.train": 30, "split.test": 10})
    table = drawn_bins(40)
    table.loc[0, ["id", "group"]] = "1102"
    write_table(workspace / "data/subset.parquet", pa.Table.from_pandas(table))
    write_rejects(workspace / "data/quarantine.csv", [Reject("00002", "no bytes")])
    main()
    lines = (workspace / "data/split.csv").read_text("utf-8").splitlines()
    ids = [line.split(",")[0] for line in lines]
    assert ids == ["id", *sorted(set(table["id"]) - {"00002"})]
    assert {line.split(",")[1] for line in lines[1:]} == {"train", "test"}


@pytest.mark.parametrize("seed", [0, 1, 2, 7, 2**32 - 1])
def test_no_real_siblings_straddle_the_split(
    real_bins: pd.DataFrame, abid_records: dict[str, bytes], seed: int
) -> None:
    sets = split(real_bins, set(), knobs(5900, 662, seed))
    assert sets["set"].value_counts().to_dict() == {"train": 5900, "test": 662}
    of_bin = dict(zip(sets["id"], sets["set"], strict=True))
    pairs = [pair for pair in sibling_pairs(abid_records) if set(pair) <= set(of_bin)]
    assert len(pairs) > 1000
    assert all(of_bin[one] == of_bin[two] for one, two in pairs)


def test_the_published_protocol_leaks_real_siblings(
    real_bins: pd.DataFrame, abid_records: dict[str, bytes]
) -> None:
    test = ids_of(split(real_bins, set(), knobs(5900, 662, by="image")), "test")
    siblings = {bin_id for pair in sibling_pairs(abid_records) for bin_id in pair}
    assert len(test & siblings) > 0.5 * len(test)
