"""The baseline stage, on small squares whose color tells the quantity."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from stages import baseline
from stages.features.histograms import (
    CELLS,
    LEVELS,
    color_histogram,
    edge_histograms,
    photograph_features,
)
from stages.formats.shards import write_table
from stages.formats.tables import read_csv, read_json
from stages.runtime.errors import UserError
from stages.scoring import evaluation
from stages.scoring.bootstrap import intervals
from tests.builders import (
    SIZE,
    bin_rows,
    noise,
    one_torch_thread,
    write_params,
    write_resized,
    write_split,
)
from tests.conftest import index_of

TRAIN = [1, 2, 3] * 25 + [2]
VALIDATION = [3, 1, 2] * 4
TEST = [1, 2, 1, 3] * 5
SETS = ["train"] * len(TRAIN) + ["validation"] * len(VALIDATION) + ["test"] * len(TEST)
REPORTS = Path("reports/baseline")


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty project, and a hundred samples in the bootstrap, which are enough here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "intervals", partial(intervals, samples=100))
    with one_torch_thread():
        yield


def write_settings(quantities: Sequence[int | str]) -> None:
    # No bin has a sibling, so no record of one can be claimed.
    settings = {"resize.size": SIZE, "subset.quantities": quantities, "evaluate.errors": "uniform"}
    write_params(Path(), settings)


def write_project(rows: Sequence[dict[str, Any]], shard_bins: int = 7) -> None:
    quantities = sorted({1, 2, 3, *(row["quantity"] for row in rows)})
    write_settings(quantities)
    write_resized(Path("data/resized"), rows, shard_bins)
    ids = [row["id"] for row in rows]
    subset = {"id": ids, "quantity": [row["quantity"] for row in rows]}
    write_table(Path("data/subset.parquet"), pa.table(subset))
    write_split(Path("data/split.csv"), dict(zip(ids, SETS, strict=True)))
    index = index_of({row["id"]: (row["quantity"], [f"ASIN {row['id']}"]) for row in rows})
    write_table(Path("data/index.parquet"), index)


def written() -> dict[str, bytes]:
    files = [path for path in Path("reports").rglob("*") if path.is_file()]
    return {path.relative_to(REPORTS).as_posix(): path.read_bytes() for path in files}


def table_of(name: str) -> pd.DataFrame:
    return read_csv(REPORTS / f"tables/{name}.csv")


def test_it_counts_what_colors_tell_and_no_majority_does() -> None:
    write_project(bin_rows(TRAIN + VALIDATION + TEST))

    summary = baseline.main()

    metrics = read_json(REPORTS / "metrics.json")
    assert metrics["accuracy"] > 0.8
    # 2 is the most frequent quantity in train.
    assert metrics["majority_accuracy"] == 0.25
    assert metrics["validation_accuracy"] > 0.8
    assert f"accuracy {metrics['accuracy']:.4g}" in summary


def test_noise_teaches_nothing() -> None:
    write_project(bin_rows(TRAIN + VALIDATION + TEST, noise))

    baseline.main()

    assert read_json(REPORTS / "metrics.json")["accuracy"] < 0.6


def test_it_has_the_tables_of_a_model_and_all_in_one_folder() -> None:
    write_project(bin_rows(TRAIN + VALIDATION + TEST))

    baseline.main()

    assert {path.name for path in REPORTS.iterdir()} == {"metrics.json", "tables"}
    names = {path.stem for path in (REPORTS / "tables").iterdir()}
    assert {"confusion", "intervals", "per_quantity", "predictions", "roc", "validation"} < names
    assert table_of("predictions")["actual"].tolist() == TEST
    assert table_of("validation")["actual"].tolist() == VALIDATION
    np.testing.assert_allclose(table_of("predictions")[["p1", "p2", "p3"]].sum(axis=1), 1, 1e-4)


def test_the_same_bins_give_the_same_bytes_whatever_the_size_of_shards() -> None:
    rows = bin_rows(TRAIN + VALIDATION + TEST)
    write_project(rows)
    baseline.main()
    before = written()
    for path in Path("data/resized").iterdir():
        path.unlink()
    write_project(rows, shard_bins=30)

    baseline.main()

    assert written() == before


def test_test_chooses_nothing() -> None:
    rows = bin_rows(TRAIN + VALIDATION + TEST)
    write_project(rows)
    baseline.main()
    validation, predictions = table_of("validation"), table_of("predictions")
    for row in rows[-len(TEST) :]:
        row["quantity"] = row["quantity"] % 3 + 1
    write_project(rows)

    baseline.main()

    pd.testing.assert_frame_equal(table_of("validation"), validation)
    pd.testing.assert_series_equal(table_of("predictions")["p1"], predictions["p1"])


def test_a_count_that_train_lacks_is_never_predicted() -> None:
    write_project(bin_rows([2 if one == 3 else one for one in TRAIN] + VALIDATION + TEST))

    baseline.main()

    assert set(table_of("predictions")["predicted"]) == {1, 2}


def test_the_highest_class_may_be_open() -> None:
    write_project(bin_rows(TRAIN + VALIDATION + TEST))
    write_settings([1, 2, "3+"])

    baseline.main()

    assert "p3+" in table_of("predictions")


def test_a_train_set_of_one_count_is_refused() -> None:
    write_project(bin_rows([2] * len(TRAIN) + VALIDATION + TEST))

    with pytest.raises(UserError, match=r"data/split\.csv puts in train have 2 items"):
        baseline.main()
    assert not REPORTS.exists()


def test_a_count_outside_the_experiment_is_refused() -> None:
    write_project(bin_rows(TRAIN + VALIDATION + TEST))
    write_settings([1, 2])

    with pytest.raises(UserError, match=r"knows the quantities \[1, 2\], not \[3\]"):
        baseline.main()
    assert not REPORTS.exists()


@pytest.mark.parametrize(
    "missing", ["data/resized", "data/split.csv", "data/subset.parquet", "data/index.parquet"]
)
def test_an_input_that_is_missing_is_named(missing: str) -> None:
    write_project(bin_rows(TRAIN + VALIDATION + TEST))
    Path(missing).rename("elsewhere")

    with pytest.raises(FileNotFoundError, match=missing):
        baseline.main()
    assert not REPORTS.exists()


def images(count: int, size: int = 100) -> Tensor:
    chance = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, size, size), generator=chance, dtype=torch.uint8)


def test_features_are_of_one_photograph_each() -> None:
    some = images(9)

    features = photograph_features(some)

    apart = torch.cat([photograph_features(part) for part in (some[:1], some[1:4], some[4:])])
    assert torch.equal(features, apart)
    assert len({tuple(one.tolist()) for one in features}) == 9
    assert torch.isfinite(photograph_features(torch.zeros_like(some))).all()


def test_each_pixel_counts_for_its_color() -> None:
    image = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    image[0, :, 0, 0] = torch.tensor([255, 64, 63])

    (histogram,) = color_histogram(image)

    assert histogram[0] == 0.75
    assert histogram[(3 * LEVELS + 1) * LEVELS] == 0.25
    assert histogram.sum() == 1


@pytest.mark.parametrize(("turned", "direction"), [(False, 0), (True, 4.5)])
def test_an_edge_counts_for_its_cell_and_the_directions_next_to_its_own(
    turned: bool, direction: float
) -> None:
    image = torch.zeros(1, 64, 64)
    # In the first cell on each side of both middle lines: no gradient reaches another one.
    image[0, :, 3:] = 1
    image[0, :, 40:] = 0
    image = image.mT if turned else image

    histograms = edge_histograms(image)[0]

    by_direction = histograms.sum((1, 2))
    nearest = torch.tensor([abs(number - direction) < 1 for number in range(len(by_direction))])
    assert (by_direction > 0).tolist() == nearest.tolist()
    cells = histograms.sum(0).mT if turned else histograms.sum(0)
    assert cells.shape == (CELLS, CELLS)
    assert set(torch.nonzero(cells)[:, 1].tolist()) == {0, 4, 5}


def test_a_dark_and_a_bright_side_may_change_places() -> None:
    (one,) = images(1, 64)
    grey = one.float().mean(0, keepdim=True) / 255

    torch.testing.assert_close(edge_histograms(grey), edge_histograms(1 - grey))
