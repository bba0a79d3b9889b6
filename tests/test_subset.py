import json
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.formats.shards import write_table
from stages.runtime.errors import UserError
from stages.runtime.params import Subset
from stages.subset import COLUMNS, main, sample, with_groups
from tests.conftest import index_of, sibling_pairs, write_params

QUANTITIES = [1, 2, 3, 4, 5]


def settings(
    bins: int,
    seed: int = 0,
    quantities: tuple[int, ...] = (1, 2, 3, 4, 5),
    order: Literal["random", "listing"] = "random",
) -> Subset:
    return Subset(quantities=list(quantities), bins=bins, order=order, seed=seed, ids=None)


@pytest.fixture(scope="module")
def index() -> pa.Table:
    """Bins with 0 to 7 items and few ASINs, so that many are siblings."""
    chance = random.Random(0)
    return index_of(
        {
            f"{number:05d}": (chance.randrange(8), chance.sample("ABCDEFGH", 2))
            for number in range(1, 401)
        }
    )


def groups_by_id(table: pa.Table) -> dict[str, str]:
    return dict(zip(table["id"].to_pylist(), table["group"].to_pylist(), strict=True))


def test_only_bins_of_the_wanted_quantities_are_sampled(index: pa.Table) -> None:
    subset = sample(with_groups(index, QUANTITIES), settings(40, quantities=(2, 7)))
    assert len(subset) == 40
    assert set(subset["quantity"].to_pylist()) == {2, 7}


def test_the_sampled_bins_are_sorted_and_keep_their_columns(index: pa.Table) -> None:
    subset = sample(with_groups(index, QUANTITIES), settings(100))
    ids = subset["id"].to_pylist()
    assert subset.schema.names == COLUMNS
    assert ids == sorted(ids)
    assert len(set(ids)) == 100
    whole = {row["id"]: row for row in index.to_pylist()}
    for row in subset.to_pylist():
        for name in ("quantity", "key", "size", "etag"):
            assert row[name] == whole[row["id"]][name]


def test_the_order_of_the_index_does_not_matter(index: pa.Table) -> None:
    order = random.Random(1).sample(range(len(index)), len(index))
    one, two = with_groups(index, QUANTITIES), with_groups(index.take(pa.array(order)), QUANTITIES)
    assert groups_by_id(one) == groups_by_id(two)
    assert sample(one, settings(100)).equals(sample(two, settings(100)))


def test_another_seed_samples_other_bins(index: pa.Table) -> None:
    grouped = with_groups(index, QUANTITIES)
    sampled = [set(sample(grouped, settings(100, seed))["id"].to_pylist()) for seed in range(3)]
    assert sampled[0] != sampled[1] != sampled[2] != sampled[0]


def test_a_larger_sample_contains_the_smaller_one(index: pa.Table) -> None:
    grouped = with_groups(index, QUANTITIES)
    few, many = (set(sample(grouped, settings(bins))["id"].to_pylist()) for bins in (50, 150))
    assert few < many


def test_a_vanished_bin_changes_at_most_one_other(index: pa.Table) -> None:
    grouped = with_groups(index, QUANTITIES)
    sampled = set(sample(grouped, settings(100))["id"].to_pylist())
    for gone in range(0, len(grouped), 40):
        rest = pa.concat_tables([grouped.slice(0, gone), grouped.slice(gone + 1)])
        again = set(sample(rest, settings(100))["id"].to_pylist())
        assert len(sampled - again) <= 1


def test_the_sample_is_not_a_run_of_the_listing(index: pa.Table) -> None:
    sampled = [
        int(bin_id)
        for bin_id in sample(with_groups(index, QUANTITIES), settings(100))["id"].to_pylist()
    ]
    assert min(sampled) < 40
    assert max(sampled) > 360
    assert 140 < sum(sampled) / len(sampled) < 260


def test_all_fitting_bins_can_be_sampled(index: pa.Table) -> None:
    fitting = sum(1 <= quantity <= 5 for quantity in index["quantity"].to_pylist())
    assert len(sample(with_groups(index, QUANTITIES), settings(fitting))) == fitting


def test_too_few_bins_are_counted_in_the_error(index: pa.Table) -> None:
    with pytest.raises(UserError) as caught:
        sample(with_groups(index, QUANTITIES), settings(1000, quantities=(6, 7)))
    fitting = sum(quantity in {6, 7} for quantity in index["quantity"].to_pylist())
    for part in ("subset.bins is 1000", f"has {fitting} bins", "subset.quantities [6, 7]"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("contents", "groups"),
    [
        # 00002 has too many items to be sampled, but still links the two.
        (
            {"00001": (2, ["A"]), "00002": (9, ["A", "B"]), "00003": (3, ["B"])},
            {"00001": "00001", "00003": "00001"},
        ),
        (
            {"00001": (2, ["A"]), "00003": (3, ["A"])},
            {"00001": "00001", "00003": "00003"},
        ),
        (
            {"00001": (2, ["A"]), "00002": (0, []), "00003": (3, ["A"])},
            {"00001": "00001", "00003": "00003"},
        ),
        (
            {"00001": (2, ["A"]), "7": (1, ["A"]), "8": (2, ["A"])},
            {"00001": "00001", "7": "7", "8": "8"},
        ),
    ],
    ids=["through a bin that is not sampled", "hole", "through an empty bin", "un-padded"],
)
def test_groups_are_found_over_all_bins(
    contents: Mapping[str, tuple[int, list[str]]], groups: Mapping[str, str]
) -> None:
    subset = sample(with_groups(index_of(contents), QUANTITIES), settings(len(groups)))
    assert groups_by_id(subset) == groups


def test_empty_bins_of_the_experiment_join_their_neighbours() -> None:
    contents: dict[str, tuple[int, list[str]]] = {
        "00001": (2, ["A"]),
        "00002": (0, []),
        "00003": (3, ["B"]),
        "00004": (1, ["C"]),
        "00006": (0, []),
        "00007": (0, []),
        "7": (0, []),
    }
    groups = groups_by_id(with_groups(index_of(contents), [0, *QUANTITIES]))
    assert groups == {
        **dict.fromkeys(["00001", "00002", "00003"], "00001"),
        "00004": "00004",
        **dict.fromkeys(["00006", "00007"], "00006"),
        "7": "7",
    }


def test_a_random_sample_has_no_unpadded_twin() -> None:
    contents = {bin_id: (1, ["A"]) for bin_id in ["1", "00001", "2", "00003", "001", "bin-1", "b7"]}
    grouped = with_groups(index_of(contents), QUANTITIES)
    assert sample(grouped, settings(5))["id"].to_pylist() == ["00001", "00003", "2", "b7", "bin-1"]
    with pytest.raises(UserError, match="the bucket has 5 bins"):
        sample(grouped, settings(6))


def test_the_listing_gives_its_first_bins_by_key_whatever_the_seed() -> None:
    contents = {bin_id: (1, ["A"]) for bin_id in ["00002", "1", "10", "00010", "2", "100000"]}
    contents["00001"] = (9, ["A"])
    grouped = with_groups(index_of(contents), QUANTITIES)
    for seed in range(3):
        first = sample(grouped, settings(4, seed, order="listing"))
        assert first["id"].to_pylist() == ["00002", "00010", "1", "10"]


def test_the_published_experiments_bins_are_the_first_of_the_listing(abid: Path) -> None:
    """Its table of classes: github.com/tho121/aws_capstone; the last bin is 395117."""
    labels = [
        pair
        for name in ("train", "val")
        for pair in json.loads((abid / f"labels/counting_{name}.json").read_text("utf-8"))
    ]
    quantities = {f"{index + 1:05d}": quantity for index, quantity in labels}
    # Un-padded ids have 0, 1, ... 5 items, 200 each.
    quantities |= {str(number): (number - 1) // 200 for number in range(1, 1201)}
    index = pa.table(
        {
            "id": list(quantities),
            "quantity": pa.array(quantities.values(), pa.int32()),
            "key": [f"bin-images/{bin_id}.jpg" for bin_id in quantities],
        }
    )
    published = sample(index, settings(220_000, order="listing"))
    counts = Counter(published["quantity"].to_pylist())
    assert [counts[quantity] for quantity in QUANTITIES] == [25_987, 48_103, 56_409, 50_384, 39_117]
    assert published.sort_by("key")["id"][-1].as_py() == "395117"


def test_bins_without_any_item_have_groups() -> None:
    assert groups_by_id(
        with_groups(index_of({"00001": (1, []), "00002": (2, [])}), QUANTITIES)
    ) == {
        "00001": "00001",
        "00002": "00002",
    }


def test_the_stage_writes_the_same_bytes_in_every_run(workspace: Path, index: pa.Table) -> None:
    write_params({"subset.bins": 100, "split.train": 80, "split.validation": 10, "split.test": 10})
    write_table(workspace / "data/index.parquet", index)
    written = []
    for _ in range(2):
        main()
        written.append((workspace / "data/subset.parquet").read_bytes())
    assert written[0] == written[1]
    subset = pq.read_table(workspace / "data/subset.parquet")
    assert subset.equals(sample(with_groups(index, QUANTITIES), settings(100)))


def test_real_siblings_share_their_group_and_no_others(
    abid_index: pa.Table, abid_records: dict[str, bytes]
) -> None:
    # A union of the pairs, found in a plain way without pandas.
    expected = {bin_id: bin_id for bin_id in abid_records}
    for one, two in sorted(sibling_pairs(abid_records)):
        expected[two] = expected[one]
    assert groups_by_id(with_groups(abid_index, QUANTITIES)) == expected


def test_three_quarters_of_the_real_bins_have_a_sibling(abid_index: pa.Table) -> None:
    sizes = Counter(with_groups(abid_index, QUANTITIES)["group"].to_pylist())
    assert sum(size for size in sizes.values() if size > 1) / sizes.total() == pytest.approx(
        0.75, abs=0.03
    )
