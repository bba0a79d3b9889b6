"""The evaluate stage, on a tiny model that is right about two bins in three."""

import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import sklearn.metrics
import torch

from stages import evaluate
from stages.formats.shards import write_table
from stages.formats.tables import read_csv, read_json, write_csv
from stages.imaging.loader import load_batches, load_bins
from stages.networks.classifier import Classifier
from stages.networks.inference import evaluate as score
from stages.networks.inference import normalizer
from stages.networks.release import load_release, save_release
from stages.runtime.errors import UserError
from stages.runtime.params import load_params
from stages.scoring import evaluation, results
from stages.scoring.bins import majority_quantity
from stages.scoring.bootstrap import intervals
from tests.builders import (
    SIZE,
    TINY_VIT,
    bin_rows,
    model_params,
    one_torch_thread,
    random_classifier,
    square,
    write_params,
    write_resized,
    write_split,
)
from tests.conftest import index_of

TRAIN = [1, 2, 3] * 8 + [2]
VALIDATION = [3, 1, 2, 2, 1, 3, 3, 1]
TEST = [1, 2, 1, 3, 1, 2, 1]
SETS = ["train"] * len(TRAIN) + ["validation"] * len(VALIDATION) + ["test"] * len(TEST)
KNOBS = model_params("vit", config=TINY_VIT, pretrained=False)
REPORTS = Path("reports/vit")
COLUMNS = ["p1", "p2", "p3"]
PLOTS = ["confusion.csv", "per_quantity.csv", "reliability.csv", "roc.csv"]
TABLES = [
    "alarms",
    "alarms_by_count",
    "calibration",
    "intervals",
    "overlap",
    "precision",
    "predictions",
]
TABLES += ["reliability_uncalibrated", "sibling_differences", "validation"]
CARD = "../../models/vit.md"
OUTPUTS = [*PLOTS, "metrics.json", *(f"tables/{name}.csv" for name in TABLES), CARD]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Use a hundred samples in the bootstrap, which are enough here."""
    with pytest.MonkeyPatch.context() as patch, one_torch_thread():
        patch.delenv("DVC_ROOT", raising=False)
        patch.setattr(evaluation, "intervals", partial(intervals, samples=100))
        yield


def project_rows() -> list[dict[str, Any]]:
    """The bins of the project. Every third record of validation and test is wrong."""
    rows = bin_rows(TRAIN + VALIDATION + TEST)
    for place in range(len(TRAIN), len(rows), 3):
        rows[place]["image"] = square(rows[place]["quantity"] % 3 + 1, place)
    for row, bin_id in zip(rows[-3:], ("2", "00100", "100"), strict=True):
        row["id"] = bin_id
    return rows


def write_data(rows: list[dict[str, Any]], sets: list[str] = SETS) -> None:
    """Bin 00034, the first of test, has a sibling in train.

    Bins 2 and 100 have none: 00002 and 00100 are others. Each bin holds a product of its own, but
    for the last two of test, which hold one of train and one of each other.
    """
    write_resized(Path("data/resized"), rows)
    ids = [row["id"] for row in rows]
    subset = {"id": ids, "quantity": [row["quantity"] for row in rows]}
    write_table(Path("data/subset.parquet"), pa.table(subset))
    write_split(Path("data/split.csv"), dict(zip(ids, sets, strict=True)), {"00034": "00001"})
    contents = {row["id"]: (row["quantity"], [f"ASIN {row['id']}"]) for row in rows}
    contents[ids[-1]][1].append(f"ASIN {ids[0]}")
    contents[ids[-2]][1].append(f"ASIN {ids[-1]}")
    # A bin of the index that the experiment does not use.
    contents["99999"] = (1, [f"ASIN {ids[-3]}"])
    write_table(Path("data/index.parquet"), index_of(contents))


def write_settings(**changes: Any) -> None:
    settings = {
        "train.vit.pretrained": False,
        "train.vit.config": TINY_VIT,
        "resize.size": SIZE,
        "resize.fit": "pad",
        "evaluate.batch_size": 3,
        "evaluate.false_alarm": 0.3,
        "evaluate.errors": "uniform",
    }
    write_params(
        Path(), settings | {key.replace("__", "."): value for key, value in changes.items()}
    )


def write_model() -> None:
    """Write models/vit as train does, after a few steps of training."""
    bins, validation = load_bins(
        Path("data/resized"), Path("data/split.csv"), "train", "validation", size=SIZE
    )
    classifier = random_classifier(KNOBS, [1, 2, 3])
    fit(classifier, next(load_batches(bins, [np.arange(len(bins))])).images, bins.quantities - 1)
    scores, ids = score(classifier, validation, 100), validation.ids
    save_release(
        Path("models/vit"),
        classifier,
        KNOBS,
        load_params().resize,
        pd.DataFrame({"id": ids, "group": ids, "actual": validation.quantities}),
        scores.probabilities.astype(np.float64),
        epoch=1,
    )


def fit(classifier: Classifier, images: torch.Tensor, targets: Any, steps: int = 3) -> None:
    optimizer = torch.optim.Adam(classifier.network.parameters(), 0.001)
    for _ in range(steps):
        logits = classifier.logits(normalizer(classifier)(images / 255))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an evaluated model."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_settings()
        write_data(project_rows())
        write_model()
        evaluate.main("vit")
    return folder


@pytest.fixture
def project(evaluated: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(evaluated)
    return evaluated


@pytest.fixture
def other(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another project with the same settings, data and model, not evaluated yet."""
    monkeypatch.chdir(tmp_path)
    write_settings()
    write_data(project_rows())
    shutil.copytree(evaluated / "models/vit", "models/vit")
    return tmp_path


def table_of(name: str, folder: Path = Path()) -> pd.DataFrame:
    return read_csv(folder / REPORTS / f"tables/{name}.csv")


def metrics() -> dict[str, Any]:
    values: dict[str, Any] = read_json(REPORTS / "metrics.json")
    return values


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / REPORTS / name).read_bytes() for name in OUTPUTS}


def test_these_files_are_written_and_no_other(project: Path) -> None:
    reports = project / REPORTS

    assert {path.name for path in reports.iterdir()} == {*PLOTS, "metrics.json", "tables"}
    assert {path.stem for path in (reports / "tables").iterdir()} == set(TABLES)
    assert {path.name for path in (project / "models").iterdir()} == {"vit", "vit.md"}


@pytest.mark.usefixtures("project")
def test_each_test_bin_has_a_row_with_its_calibrated_scores() -> None:
    release = load_release(Path("models/vit"))
    bins = load_bins(Path("data/resized"), Path("data/split.csv"), "validation", "test", size=SIZE)
    validation, scores = (score(release.classifier, some, 100) for some in bins)

    table = table_of("predictions")

    assert table.columns.tolist() == ["id", "group", "actual", "predicted", *COLUMNS]
    assert table["id"].tolist() == ["00034", "00035", "00036", "00037", "2", "00100", "100"]
    assert table["actual"].tolist() == TEST
    np.testing.assert_allclose(table[COLUMNS], scores.probabilities, rtol=1e-5)
    assert table["predicted"].tolist() == (scores.probabilities.argmax(axis=1) + 1).tolist()
    calibration = table_of("calibration")
    assert calibration["nll"].iloc[1] == pytest.approx(scores.loss, rel=1e-4)
    assert calibration["temperature"].iloc[1] == pytest.approx(
        release.settings.folded_temperature, rel=1e-5
    )
    # The saved network gives the calibrated probabilities that its thresholds are chosen among.
    found = release.validation[COLUMNS]
    np.testing.assert_allclose(found, validation.probabilities, rtol=1e-5)
    pd.testing.assert_frame_equal(table_of("validation"), release.validation)


@pytest.mark.usefixtures("project")
def test_the_metrics_are_those_of_the_predictions() -> None:
    table, validation = table_of("predictions"), table_of("validation")
    actual, predicted = table["actual"], table["predicted"]
    wrong = actual.to_numpy()[:, None] != [1, 2, 3]
    alarms = table[COLUMNS].to_numpy() < table_of("alarms_by_count")["threshold"][0]

    values = metrics()

    expected = {
        "accuracy": sklearn.metrics.accuracy_score(actual, predicted),
        "rmse": sklearn.metrics.root_mean_squared_error(actual, predicted),
        "auroc": sklearn.metrics.roc_auc_score(wrong.ravel(), -table[COLUMNS].to_numpy().ravel()),
        "found": alarms[wrong].mean(),
        "false_alarms": alarms[~wrong].mean(),
        "validation_accuracy": (validation["actual"] == validation["predicted"]).mean(),
        "validation_rmse": sklearn.metrics.root_mean_squared_error(
            validation["actual"], validation["predicted"]
        ),
        "validation_nll": -np.log(
            validation[COLUMNS].to_numpy()[range(len(validation)), validation["actual"] - 1]
        ).mean(),
        "validation_auroc": sklearn.metrics.roc_auc_score(
            (validation["actual"].to_numpy()[:, None] != [1, 2, 3]).ravel(),
            -validation[COLUMNS].to_numpy().ravel(),
        ),
        # 2 is the most frequent quantity in train, though 1 is in test.
        "majority_accuracy": 2 / 7,
        "test_bins": 7,
    }
    assert values | expected == pytest.approx(values, rel=1e-4)
    assert 0 < expected["accuracy"] < 1
    rows = table_of("intervals").set_index("metric")["value"]
    assert {name: rows[name] for name in rows.index if name in values} == pytest.approx(
        {name: values[name] for name in values if name in rows.index}, rel=1e-5
    )


def test_evaluating_again_gives_the_same_bytes_and_says_the_accuracy(project: Path) -> None:
    before = files_of(project)

    summary = evaluate.main("vit")

    assert files_of(project) == before
    assert f"accuracy {metrics()['accuracy']:.4g}" in summary


def with_other_labels(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["quantity"] = row["quantity"] % 3 + 1


def with_other_photographs(rows: list[dict[str, Any]]) -> None:
    for row, other_row in zip(rows, bin_rows([3] * len(rows)), strict=True):
        row["image"] = other_row["image"]


@pytest.mark.parametrize("change", [with_other_labels, with_other_photographs])
def test_test_chooses_no_threshold(
    change: Callable[[list[dict[str, Any]]], None], evaluated: Path, other: Path
) -> None:
    rows = project_rows()
    change(rows[-len(TEST) :])
    write_data(rows)

    evaluate.main("vit")

    thresholds = [table_of("alarms_by_count", folder)["threshold"] for folder in (other, evaluated)]
    assert thresholds[0].tolist() == thresholds[1].tolist()
    # The measurements on test differ.
    before, after = files_of(evaluated), files_of(other)
    for name in ("metrics.json", "roc.csv", "tables/predictions.csv", CARD):
        assert after[name] != before[name], name


@pytest.mark.parametrize("seen", ["train", "validation"])
@pytest.mark.usefixtures("other")
def test_a_bin_with_a_sibling_that_was_seen_is_counted_apart(seen: str) -> None:
    write_data(project_rows(), [seen, *SETS[1:]])

    evaluate.main("vit")

    # Not 2 and 100 too, whose twins by number were seen.
    rows = table_of("overlap").set_index(["shared", "half"])["test_bins"]
    assert rows["siblings"].to_dict() == {"with": 1, "without": 6, "difference": 7}


@pytest.mark.usefixtures("project")
def test_a_bin_with_a_product_that_was_seen_is_counted_apart() -> None:
    # Only the last one: what test bins share with each other, or with unused bins, was not seen.
    rows = table_of("overlap").set_index(["shared", "half"])["test_bins"]
    assert rows["products"].to_dict() == {"with": 1, "without": 6, "difference": 7}


@pytest.mark.usefixtures("other")
def test_a_model_that_was_not_trained_is_a_missing_input() -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("models/resnet34")):
        evaluate.main("resnet34")


@pytest.mark.usefixtures("other")
def test_quantities_that_the_model_does_not_know_are_refused() -> None:
    rows = project_rows()
    rows[-1]["quantity"] = 5
    write_data(rows)

    with pytest.raises(UserError, match=r"knows the quantities \[1, 2, 3\], not \[5\]"):
        evaluate.main("vit")
    assert not Path("reports").exists()


@pytest.mark.usefixtures("other")
def test_photographs_of_another_size_are_refused() -> None:
    write_settings(resize__size=64)

    with pytest.raises(UserError, match=r"32 x 32 .* 64.*dvc repro --force resize"):
        evaluate.main("vit")


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize("place", range(0, 8, 3))
def test_the_folder_of_tables_is_whole_or_absent(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def write_some(path: Path, table: pd.DataFrame, digits: int) -> None:
        written.append(path)
        if len(written) > place:
            raise OSError("no more")
        write_csv(path, table, digits)

    monkeypatch.setattr(results, "write_csv", write_some)

    with pytest.raises(OSError, match="no more"):
        evaluate.main("vit")
    assert not (REPORTS / "tables").exists()
    assert not (REPORTS / "metrics.json").exists()


@pytest.mark.parametrize(
    ("in_train", "majority"), [([1, 3, 3, 2], 3), ([5, 4, 4, 5, 1], 4), ([2], 2)]
)
def test_the_majority_is_trains_most_frequent_and_the_smaller_of_equals(
    in_train: list[int], majority: int
) -> None:
    sets = ["train"] * len(in_train) + ["validation"] * 3 + ["test"] * 2
    bins = pd.DataFrame({"quantity": [*in_train, 1, 1, 1, 1, 1], "set": sets})

    assert majority_quantity(bins) == majority
