"""The witness of a record's items: the model, the wrong records, its folder and its stage."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from stages import witness as stage
from stages.features.histograms import CELLS
from stages.features.layout import cell_colors, layout_features
from stages.features.projection import feature_batches, fit_projection, linear_map, project
from stages.formats.shards import write_table
from stages.formats.tables import read_csv, read_json, write_csv
from stages.runtime.errors import UserError
from stages.scoring import wrong_records
from stages.scoring.bootstrap import intervals
from stages.scoring.exchanges import picks, swaps
from stages.scoring.scored import Scored
from stages.scoring.witness import (
    NUMBERS,
    Witness,
    fit_weight,
    fit_witness,
    record_numbers,
)
from stages.scoring.witness_files import load_witness
from tests.builders import (
    COLORS,
    SIZE,
    bin_rows,
    make_bins,
    one_torch_thread,
    square,
    write_params,
    write_resized,
    write_split,
)
from tests.conftest import index_table

REPORTS, MODEL = Path("reports/witness"), Path("models/witness")
# The volume of what a square shows follows from its color, and the count does not.
KINDS = len(COLORS)
COUNTS = {"train": [1, 2] * 60, "validation": [1, 2] * 15, "test": [2, 1] * 20}


def item(**changes: Any) -> dict[str, Any]:
    inches = {name: {"unit": "IN", "value": 2.0} for name in ("height", "length", "width")}
    return {"quantity": 1, **inches, "weight": {"unit": "pounds", "value": 3.0}} | changes


def numbers_of(*items: dict[str, Any]) -> dict[str, float]:
    return dict(zip(NUMBERS, record_numbers(items).tolist(), strict=True))


def test_the_numbers_of_a_record_are_those_of_all_its_items() -> None:
    small = item(quantity=3)
    large = item(length={"unit": "IN", "value": 10.0}, weight={"unit": "pounds", "value": 0.5})

    numbers = numbers_of(small, large)

    volumes, weights = np.log([3 * 8 + 40, 40, 8]), np.log([3 * 3 + 0.5, 3, 0.5])
    assert [*numbers.values()] == pytest.approx([*volumes, *weights, np.log(10), 2])


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"unit": "IN", "value": None},
        {"unit": "IN", "value": 0.0},
        {"unit": "IN", "value": -2.0},
        {"unit": "IN", "value": 1e-300},
        {"unit": "IN", "value": float("inf")},
        {"unit": "IN", "value": float("nan")},
        {"unit": "CM", "value": 2.0},
        {"unit": None, "value": 2.0},
    ],
)
def test_a_side_that_says_nothing_is_left_out(value: Any) -> None:
    some = numbers_of(item(), item(width=value))
    alone = numbers_of(item(width=value))

    assert some["volume"] == pytest.approx(np.log(8))
    assert some["products"] == 2
    assert np.isnan([alone["volume"], alone["largest_volume"], alone["smallest_volume"]]).all()
    assert alone["longest_side"] == pytest.approx(np.log(2))
    assert np.isfinite(alone["weight"])


def test_a_record_without_items_or_with_odd_quantities_has_numbers() -> None:
    assert np.isnan([*numbers_of().values()][:-1]).all()
    assert numbers_of()["products"] == 0
    for quantity in (None, 0):
        assert numbers_of(item(quantity=quantity)) == numbers_of(item())
    assert numbers_of(item(quantity=2**31 - 1))["volume"] == pytest.approx(np.log(8 * (2**31 - 1)))


class World:
    """Photographs with three features, of which one shows how large the items are."""

    def __init__(self, bins: int, labels: int = 3, seed: int = 0) -> None:
        chance = np.random.default_rng(seed)
        self.features = chance.normal(size=(bins, 3))
        self.columns = chance.integers(labels, size=bins)
        self.numbers = chance.normal(size=(bins, len(NUMBERS))) + self.columns[:, None]
        self.numbers[:, :3] += 2 * self.features[:, :1]

    def fit(self) -> Witness:
        return fit_witness(self.features, self.numbers, self.columns, 3)


def evidence(witness: Witness, world: World, records: NDArray[np.int64] | None = None) -> Any:
    expected = witness.expected(world.features)
    deviations = witness.deviations(world.numbers, world.columns)
    return witness.evidence(expected, deviations if records is None else deviations[records])


def test_a_record_that_fits_its_photograph_better_has_more_evidence() -> None:
    witness = World(2000).fit()
    photographs = np.array([[2.0, 0, 0]] * 3)
    numbers = np.full((3, len(NUMBERS)), 1.0)
    numbers[:, :3] += [[4.0], [0.0], [-4.0]]

    found = witness.evidence(
        witness.expected(photographs), witness.deviations(numbers, np.array([1, 1, 1]))
    )

    assert found[0] > 0 > found[1] > found[2]


def test_the_evidence_is_the_likelihood_ratio_of_the_distributions_it_was_fitted_on() -> None:
    """So its weight is 1, and the mean likelihood ratio of unrelated records is 1."""
    witness, unseen = World(20_000).fit(), World(20_000, seed=1)
    others = swaps([str(one) for one in range(20_000)], unseen.columns)
    records = np.empty(20_000, np.int64)
    records[others.bins] = others.others

    right, wrong = evidence(witness, unseen), evidence(witness, unseen, records)

    assert fit_weight(right, wrong) == pytest.approx(1, abs=0.05)
    assert np.exp(wrong).mean() == pytest.approx(1, abs=0.1)


def test_evidence_says_nothing_about_the_count() -> None:
    world = World(2000)
    witness = world.fit()
    shifted = witness.deviations(world.numbers + 1 - world.columns[:, None], np.full(2000, 1))

    np.testing.assert_allclose(
        shifted.mean(axis=0),
        witness.deviations(world.numbers, world.columns).mean(axis=0),
        atol=0.1,
    )


def test_missing_and_absurd_numbers_neither_fail_nor_decide() -> None:
    world = World(500)
    world.numbers[::7, 2] = np.nan
    world.numbers[:, 5] = np.nan
    world.numbers[3, 0] = 1e6
    witness = world.fit()

    found = evidence(witness, world)

    assert np.isfinite(found).all()
    absurd = World(500)
    absurd.numbers[:, 0] = 1e9
    limit = World(500)
    limit.numbers[:, 0] = witness.highest[0]
    np.testing.assert_array_equal(evidence(witness, absurd), evidence(witness, limit))


@pytest.mark.parametrize("bins", [1, 2, 3, 9])
def test_a_few_bins_and_a_label_without_any_can_be_fitted(bins: int) -> None:
    world = World(bins, labels=1)
    witness = world.fit()

    assert np.isfinite(evidence(witness, World(20))).all()


def test_the_number_that_speaks_against_a_record_is_found_with_its_direction() -> None:
    witness = World(2000).fit()
    expected = witness.expected(np.array([[0.0, 0, 0], [0.0, 0, 0], [2.0, 0, 0]]))
    deviations = np.zeros((3, len(NUMBERS)))
    deviations[0, 1], deviations[1, 1] = 3, -3
    deviations[2, :3] = expected[2, :3]

    numbers, above = witness.strongest_doubts(expected, deviations)

    assert numbers[:2].tolist() == [1, 1]
    assert above[:2].tolist() == [True, False]
    # The last record is unusual, but in just what the photograph lets one expect.
    assert numbers[2] > 2


def test_evidence_without_wrong_records_to_check_it_by_has_no_weight() -> None:
    assert fit_weight(np.empty(0), np.empty(0)) == 0
    nothing = np.random.default_rng(0).normal(size=500)
    assert fit_weight(nothing, nothing) == pytest.approx(0, abs=1e-3)


IDS = [f"{number:05d}" for number in range(60)]
GROUPS = [f"{number - number % 3:05d}" for number in range(60)]
ACTUAL = np.random.default_rng(0).integers(1, 6, 60)
ACTUAL[59] = 9


def test_each_record_is_claimed_as_often_rightly_as_wrongly() -> None:
    for pairs in (picks(IDS, GROUPS, ACTUAL), swaps(IDS, ACTUAL)):
        assert len(pairs.bins)
        assert sorted(pairs.bins) == sorted(pairs.others)
        assert (pairs.bins != pairs.others).all()


def test_picks_are_of_siblings_with_other_counts_and_swaps_of_equal_counts() -> None:
    missed, swapped = picks(IDS, GROUPS, ACTUAL), swaps(IDS, ACTUAL)

    groups = np.array(GROUPS)
    assert (groups[missed.bins] == groups[missed.others]).all()
    assert (ACTUAL[missed.bins] != ACTUAL[missed.others]).all()
    assert (ACTUAL[swapped.bins] == ACTUAL[swapped.others]).all()
    # The only bin with nine items has no partner; every other bin has exactly one.
    assert sorted(swapped.bins) == list(range(59))


def test_the_order_of_the_bins_changes_no_swap() -> None:
    order = np.random.default_rng(1).permutation(60)
    ids = [IDS[row] for row in order]

    first, second = swaps(IDS, ACTUAL), swaps(ids, ACTUAL[order])

    assert {(IDS[a], IDS[b]) for a, b in zip(*first, strict=True)} == {
        (ids[a], ids[b]) for a, b in zip(*second, strict=True)
    }


def test_features_see_where_a_color_is_and_are_of_one_photograph_each() -> None:
    images = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)
    images[0, 0, : SIZE // CELLS, : SIZE // CELLS] = 255

    colors = cell_colors(images.float() / 255)

    assert colors[0].nonzero().tolist() == [[0, 0, 0]]
    noise = torch.randint(256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    torch.testing.assert_close(layout_features(noise)[1:2], layout_features(noise[1:2]))


def test_the_linear_map_does_what_the_projection_does(tmp_path: Path) -> None:
    bins = make_bins(tmp_path, [1, 2, 3, 4, 5] * 6)
    projection = fit_projection(bins, 4, layout_features, "test")
    matrix, offset = linear_map(projection)
    features = next(feature_batches(bins, np.arange(30), layout_features, "test"))

    projected = project(projection, bins, layout_features, "test")

    np.testing.assert_allclose(features @ matrix + offset, projected, atol=1e-3)


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty project, and a few samples in the bootstrap, which are enough here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wrong_records, "intervals", partial(intervals, samples=20))
    with one_torch_thread():
        yield


def inches(volume: float) -> dict[str, Any]:
    return {
        name: {"unit": "IN", "value": volume ** (1 / 3)} for name in ("height", "length", "width")
    }


def write_project(
    counts: dict[str, list[int]] = COUNTS,
    labels: Sequence[int | str] = (1, 2),
    shard_bins: int = 50,
) -> None:
    """Bins whose items are as large as the color of the square says. Pairs of bins are siblings."""
    sets = [name for name, of_set in counts.items() for _ in of_set]
    actual = [count for of_set in counts.values() for count in of_set]
    rows = bin_rows(actual, lambda _, number: square(1 + number % KINDS, number))
    ids = [row["id"] for row in rows]
    groups = {bin_id: ids[number - number % 2] for number, bin_id in enumerate(ids)}
    write_params(Path(), {"resize.size": SIZE, "subset.quantities": [*labels]})
    write_resized(Path("data/resized"), rows, shard_bins)
    write_split(Path("data/split.csv"), dict(zip(ids, sets, strict=True)), groups)
    records = {
        row["id"]: {"quantity": row["quantity"], "items": [record_item(number)]}
        for number, row in enumerate(rows, start=1)
    }
    write_table(Path("data/index.parquet"), index_table(records))
    write_counts(pd.DataFrame({"id": ids, "set": sets, "actual": actual}), groups, labels)


def record_item(number: int) -> dict[str, Any]:
    return {"asin": f"B{number}"} | item(**inches(float(10 ** (number % KINDS))))


def write_counts(bins: pd.DataFrame, groups: dict[str, str], labels: Sequence[int | str]) -> None:
    """The tables of an ensemble that counts at random."""
    chance = np.random.default_rng(0)
    for set_name, name in (("validation", "validation"), ("test", "predictions")):
        some = bins[bins["set"] == set_name]
        scored = Scored(
            some["id"].tolist(),
            [groups[one] for one in some["id"]],
            some["actual"].to_numpy(),
            chance.dirichlet(np.ones(len(labels)), len(some)),
            [int(str(label).removesuffix("+")) for label in labels],
        )
        table = scored.table()
        table.columns = [*table.columns[:4], *(f"p{label}" for label in labels)]
        write_csv(Path(f"reports/ensemble/tables/{name}.csv"), table, digits=17)


def measured() -> dict[tuple[str, str, str], float]:
    """The values by kind of wrong records, witness and metric."""
    table = read_csv(REPORTS / "tables/verification.csv", empty_is_missing=True)
    keys = table[["errors", "witness", "metric"]].itertuples(index=False, name=None)
    return dict(zip(keys, table["value"].tolist(), strict=True))


def written() -> dict[str, bytes]:
    files = [path for root in (REPORTS, MODEL) for path in root.rglob("*") if path.is_file()]
    return {path.as_posix(): path.read_bytes() for path in files}


@pytest.mark.usefixtures("quick")
def test_items_find_swaps_that_no_count_can_find() -> None:
    write_project()

    summary = stage.main()

    table = measured()
    # Every fifth swap is of items with the same color and size.
    assert table["swaps", "items", "auroc"] > 0.7
    assert table["swaps", "both", "auroc"] > 0.6
    assert table["swaps", "count", "auroc"] == pytest.approx(0.5)
    assert table["swaps", "items", "found"] > table["swaps", "count", "found"]
    metrics = read_json(REPORTS / "metrics.json")
    assert metrics["swaps_records"] == len(COUNTS["test"])
    assert metrics["weight"] > 0
    assert f"swaps_auroc_items {metrics['swaps_auroc_items']:.4g}" in summary


@pytest.mark.usefixtures("quick")
def test_the_record_alone_gives_nothing_away_in_any_table() -> None:
    write_project()

    stage.main()

    table = measured()
    for kind in ("picks", "swaps"):
        assert table[kind, "record", "auroc"] == 0.5
        assert table[kind, "record", "found"] == table[kind, "record", "false_alarms"]


@pytest.mark.usefixtures("quick")
def test_the_same_bins_give_the_same_bytes_whatever_the_size_of_shards() -> None:
    write_project()
    stage.main()
    before = written()
    for path in Path("data/resized").iterdir():
        path.unlink()
    write_project(shard_bins=23)

    stage.main()

    assert written() == before


@pytest.mark.usefixtures("quick")
def test_test_chooses_nothing() -> None:
    write_project()
    stage.main()
    before = {path: data for path, data in written().items() if path.startswith("models")}
    write_project(COUNTS | {"test": [1, 1, 1, 2] * 10})

    stage.main()

    assert {path: data for path, data in written().items() if path.startswith("models")} == before


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("counts", "labels"),
    [
        ({"train": [1, 2, 3] * 4, "validation": [1, 2, 3], "test": [3, 3, 1]}, [1, 2, "3+"]),
        ({"train": [1, 2], "validation": [2], "test": [1]}, [1, 2]),
    ],
    ids=["open class", "hardly any bins"],
)
def test_tiny_sets_and_an_open_class_go_through(
    counts: dict[str, list[int]], labels: list[int | str]
) -> None:
    write_project(counts, labels)

    stage.main()

    release = load_witness(MODEL)
    assert release.settings.labels == [str(label) for label in labels]
    assert len(release.validation) == len(counts["validation"])
    # No two bins of these validation sets have the same count.
    assert release.witness.weight == 0


@pytest.mark.usefixtures("quick")
def test_the_folder_has_what_an_audit_needs_and_is_refused_if_it_is_damaged() -> None:
    write_project()
    stage.main()
    release = load_witness(MODEL)
    assert (release.settings.pixels, release.settings.fit) == (SIZE, "squeeze")
    first = (MODEL / "witness.safetensors").read_bytes()
    (MODEL / "witness.safetensors").write_bytes(first[:-1] + b"x")

    with pytest.raises(UserError, match="SHA-256 is not the one in"):
        load_witness(MODEL)

    (MODEL / "witness.json").write_text("{}")
    with pytest.raises(UserError, match=r"witness\.json is damaged \(numbers"):
        load_witness(MODEL)


@pytest.mark.usefixtures("quick")
def test_counts_of_other_bins_are_refused() -> None:
    write_project()
    table = read_csv(Path("reports/ensemble/tables/predictions.csv"))
    write_csv(Path("reports/ensemble/tables/predictions.csv"), table.iloc[1:], digits=17)

    with pytest.raises(UserError, match="is about other bins than"):
        stage.main()
    assert not REPORTS.exists()


def test_a_weight_scales_belief_only() -> None:
    witness = World(100).fit()
    some = np.array([-2.0, 0.0, 2.0])

    assert witness.belief(some).tolist() == pytest.approx((1 / (1 + np.exp(-some))).tolist())
    assert replace(witness, weight=0.0).belief(some).tolist() == [0.5] * 3
