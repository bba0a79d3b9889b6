"""The evaluate stage, on a small model of the train stage."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from huggingface_hub import ModelCard

from stages import evaluate, pretrained, train
from stages.formats.tables import read_csv
from stages.imaging.loader import load_bins
from stages.networks.calibration import fit_temperature, negative_log_likelihood, with_temperature
from stages.networks.inference import evaluate as score
from stages.networks.release import Settings, digests_of, load_release, write_settings
from stages.runtime.errors import UserError
from stages.scoring import evaluation
from stages.scoring.bootstrap import intervals
from stages.scoring.verification import threshold_for
from tests.made import (
    TINY_VIT,
    bin_rows,
    equal,
    weights_of,
    write_params,
    write_resized,
    write_split,
)

TRAIN = [1, 2, 3] * 8 + [2]
VALIDATION = [3, 1, 2, 2, 1, 3, 3, 1]
TEST = [1, 2, 1, 3, 1, 2, 1]
SETS = ["train"] * len(TRAIN) + ["validation"] * len(VALIDATION) + ["test"] * len(TEST)
REPORTS = Path("reports/vit")
COLUMNS = ["p1", "p2", "p3"]
CURVES = ["epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"]
CURVES += ["test_loss", "test_accuracy"]
OUTPUTS = [
    "alarms.csv",
    "calibration.csv",
    "confusion.csv",
    "inference.json",
    "intervals.csv",
    "metrics.json",
    "per_quantity.csv",
    "precision.csv",
    "predictions.csv",
    "reliability.csv",
    "reliability_uncalibrated.csv",
    "roc.csv",
    "siblings.csv",
    "validation.csv",
]
# What validation alone says.
CHOSEN = ["inference.json", "validation.csv"]


@pytest.fixture(scope="module", autouse=True)
def few_samples() -> Iterator[None]:
    """A hundred of them are enough here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "intervals", partial(intervals, samples=100))
        yield


def project_rows() -> list[dict[str, Any]]:
    rows = bin_rows(TRAIN + VALIDATION + TEST)
    for row, bin_id in zip(rows[-3:], ("2", "00100", "100"), strict=True):
        row["id"] = bin_id
    return rows


def write_data(folder: Path, rows: list[dict[str, Any]], sets: list[str] = SETS) -> None:
    """Bin 00034, the first of test, has a sibling in train.

    Bins 2 and 100 have none: 00002 and 00100 are others.
    """
    write_resized(folder / "data/resized", rows)
    ids = [row["id"] for row in rows]
    write_split(folder / "data/split.csv", dict(zip(ids, sets, strict=True)), {"00034": "00001"})


def write_knobs(folder: Path, **evaluate_knobs: Any) -> None:
    knobs = {
        "train.vit.pretrained": False,
        "train.vit.config": TINY_VIT,
        "train.vit.epochs": 2,
        "train.vit.batch_size": 8,
        "train.vit.warmup_steps": 0,
        "train.vit.learning_rate": 0.003,
        "resize.fit": "pad",
        "resize.quality": 80,
        "evaluate.batch_size": 3,
        "evaluate.false_alarm": 0.3,
    }
    changes = {f"evaluate.{key}": value for key, value in evaluate_knobs.items()}
    write_params(folder, knobs | changes)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a trained model that was evaluated: half right, as it is half trained."""
    folder = tmp_path_factory.mktemp("project")
    write_knobs(folder)
    write_data(folder, project_rows())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("DVC_ROOT", raising=False)
        pretrained.main("vit")
        train.main("vit")
        evaluate.main("vit")
    return folder


@pytest.fixture
def project(evaluated: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(evaluated)
    return evaluated


def table_of(name: str) -> pd.DataFrame:
    return read_csv(REPORTS / f"{name}.csv")


def predictions() -> pd.DataFrame:
    return table_of("predictions")


def metrics() -> dict[str, Any]:
    values: dict[str, Any] = json.loads((REPORTS / "metrics.json").read_text())
    return values


def settings() -> dict[str, Any]:
    values: dict[str, Any] = json.loads((REPORTS / "inference.json").read_text())
    return values


def files_of(folder: Path, names: list[str] = OUTPUTS) -> dict[str, bytes]:
    card = folder / "models/vit.md"
    return {name: (folder / REPORTS / name).read_bytes() for name in names} | {
        "card": card.read_bytes()
    }


def test_these_files_are_written_and_no_other(project: Path) -> None:
    found = {path.name for path in (project / REPORTS).iterdir()}

    assert found == {*OUTPUTS, "curves.csv"}
    assert {path.name for path in (project / "models").iterdir()} == {"pretrained", "vit", "vit.md"}


@pytest.mark.usefixtures("project")
def test_each_test_bin_has_a_row_with_its_id_as_it_is() -> None:
    table = predictions()

    assert table.columns.tolist() == ["id", "actual", "predicted", *COLUMNS]
    assert table["id"].tolist() == ["00034", "00035", "00036", "00037", "2", "00100", "100"]
    assert table["actual"].tolist() == TEST


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("name", ["predictions", "validation"])
def test_probabilities_sum_to_1_and_the_highest_is_the_prediction(name: str) -> None:
    table = table_of(name)
    probabilities = table[COLUMNS].to_numpy()

    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert table["predicted"].tolist() == (probabilities.argmax(axis=1) + 1).tolist()


def auroc_of(table: pd.DataFrame) -> float:
    """By scikit-learn, of every count of every bin, where a low score should be a wrong count."""
    scores = table[COLUMNS].to_numpy()
    wrong = table["actual"].to_numpy()[:, None] != [1, 2, 3]
    area: float = sklearn.metrics.roc_auc_score(wrong.ravel(), -scores.ravel())
    return area


@pytest.mark.usefixtures("project")
def test_the_metrics_are_those_of_the_predictions() -> None:
    table, validation = predictions(), table_of("validation")
    actual, predicted = table["actual"], table["predicted"]
    absolute_error = (actual - predicted).abs()
    probabilities = table[COLUMNS].to_numpy()
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    reliability = table_of("reliability")
    gap = (reliability["accuracy"] - reliability["confidence"]).abs()
    alarm = table_of("alarms").iloc[0]

    assert metrics() == pytest.approx(
        {
            "accuracy": sklearn.metrics.accuracy_score(actual, predicted),
            # Of the quantity most frequent in train, which is 2; in test that is 1.
            "majority_accuracy": 2 / 7,
            "rmse": sklearn.metrics.root_mean_squared_error(actual, predicted),
            "mae": sklearn.metrics.mean_absolute_error(actual, predicted),
            "within_one": (absolute_error <= 1).mean(),
            "macro_f1": sklearn.metrics.f1_score(
                actual, predicted, average="macro", zero_division=0
            ),
            "kappa": sklearn.metrics.cohen_kappa_score(actual, predicted, weights="quadratic"),
            "rmse_of_mean": sklearn.metrics.root_mean_squared_error(
                actual, probabilities @ [1, 2, 3]
            ),
            "nll": sklearn.metrics.log_loss(actual, probabilities, labels=[1, 2, 3]),
            "ece": (gap * reliability["test_bins"]).sum() / 7,
            "auroc": auroc_of(table),
            "found": alarm["found"],
            "false_alarms": alarm["false_alarms"],
            "validation_accuracy": (validation["actual"] == validation["predicted"]).mean(),
            "test_bins": 7,
        },
        rel=1e-4,
    )


@pytest.mark.usefixtures("project")
def test_each_metric_of_test_has_an_interval() -> None:
    rows = table_of("intervals").set_index("metric")

    assert (rows["low"] <= rows["high"]).all()
    headline = rows[~rows.index.str.startswith("found_at_")]
    assert len(headline) == len(rows) - 3
    others = {"majority_accuracy", "validation_accuracy", "test_bins"}
    expected = {name: value for name, value in metrics().items() if name not in others}
    assert headline["value"].to_dict() == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("project")
def test_recall_and_precision_per_quantity_are_those_of_the_predictions() -> None:
    table = predictions()
    precision, recall, _, bins = sklearn.metrics.precision_recall_fscore_support(
        table["actual"], table["predicted"], labels=[1, 2, 3], zero_division=0
    )

    rows = table_of("per_quantity")

    assert rows.columns.tolist() == ["quantity", "recall", "precision", "test_bins"]
    assert rows["quantity"].tolist() == [1, 2, 3]
    assert rows["test_bins"].tolist() == bins.tolist() == [4, 2, 1]
    np.testing.assert_allclose(rows["recall"], recall, atol=1e-5)
    np.testing.assert_allclose(rows["precision"], precision, atol=1e-5)


@pytest.mark.usefixtures("project")
def test_confusion_has_a_row_for_each_pair_of_counts() -> None:
    table = predictions()
    expected = sklearn.metrics.confusion_matrix(
        table["actual"], table["predicted"], labels=[1, 2, 3]
    )

    rows = table_of("confusion")

    assert rows.columns.tolist() == ["actual", "predicted", "test_bins"]
    assert rows["actual"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert rows["predicted"].tolist() == [1, 2, 3] * 3
    assert rows["test_bins"].tolist() == expected.ravel().tolist()


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(("name", "calibrated"), [("", True), ("_uncalibrated", False)])
def test_reliability_is_that_of_the_predictions(name: str, calibrated: bool) -> None:
    confidence = predictions()[COLUMNS].to_numpy()
    if not calibrated:
        confidence = with_temperature(confidence, 1 / settings()["temperature"])

    rows = table_of(f"reliability{name}")

    assert rows["test_bins"].sum() == 7
    weighted = rows[["confidence", "accuracy"]].mul(rows["test_bins"], axis=0).sum() / 7
    assert weighted["confidence"] == pytest.approx(confidence.max(axis=1).mean(), rel=1e-3)
    assert weighted["accuracy"] == pytest.approx(metrics()["accuracy"], rel=1e-4)


@pytest.mark.usefixtures("project")
def test_the_saved_model_scores_as_it_did_after_its_last_epoch() -> None:
    curves = table_of("curves")

    assert curves.columns.tolist() == CURVES
    assert curves["epoch"].tolist() == [1, 2]
    last, temperature = curves.iloc[-1], settings()["temperature"]
    assert temperature != pytest.approx(1, rel=0.01)
    for name, table in (("test", predictions()), ("validation", table_of("validation"))):
        accuracy = (table["actual"] == table["predicted"]).mean()
        assert last[f"{name}_accuracy"] == pytest.approx(accuracy, abs=1e-5)
        raw = with_temperature(table[COLUMNS].to_numpy(), 1 / temperature)
        loss = negative_log_likelihood(raw, table["actual"].to_numpy() - 1).mean()
        assert last[f"{name}_loss"] == pytest.approx(loss, rel=1e-3)
    assert table_of("calibration")["nll"].iloc[0] == pytest.approx(last["test_loss"], rel=1e-4)


@pytest.mark.usefixtures("project")
def test_validation_is_calibrated_by_the_temperature_that_fits_it() -> None:
    table = table_of("validation")

    assert table["id"].tolist() == [f"{number:05d}" for number in range(26, 34)]
    assert table["actual"].tolist() == VALIDATION
    # Nothing is left to fit.
    probabilities, targets = table[COLUMNS].to_numpy(), table["actual"].to_numpy() - 1
    assert fit_temperature(probabilities, targets) == pytest.approx(1, abs=1e-3)
    assert table_of("calibration")["temperature"].tolist() == pytest.approx(
        [1, settings()["temperature"]], rel=1e-5
    )


@pytest.mark.usefixtures("project")
def test_the_alarms_are_those_of_validations_threshold() -> None:
    table = table_of("validation")
    right = np.array([row[f"p{row['actual']}"] for _, row in table.iterrows()])

    alarms = table_of("alarms")

    assert alarms["alarms"].tolist() == ["chosen", "1%", "5%", "10%"]
    # Of eight a share of 0.3 is two.
    chosen = alarms.iloc[0]
    assert chosen["threshold"] == pytest.approx(np.sort(right)[2])
    scores = predictions()[COLUMNS].to_numpy()
    claimed = predictions()["actual"].to_numpy()[:, None] == [1, 2, 3]
    alarmed = scores < chosen["threshold"] - 1e-6
    assert chosen["false_alarms"] == pytest.approx(alarmed[claimed].mean(), rel=1e-5)
    assert chosen["found"] == pytest.approx(alarmed[~claimed].mean(), rel=1e-5)
    precision = table_of("precision")
    assert precision["alarms"].tolist() == [name for name in alarms["alarms"] for _ in range(3)]


@pytest.mark.usefixtures("project")
def test_the_roc_curve_is_that_of_the_predictions() -> None:
    scores = predictions()[COLUMNS].to_numpy()
    wrong = predictions()["actual"].to_numpy()[:, None] != [1, 2, 3]
    false_alarms, found, _ = sklearn.metrics.roc_curve(
        wrong.ravel(), -scores.ravel(), drop_intermediate=False
    )
    curve = {(round(x, 4), round(y, 4)) for x, y in zip(false_alarms, found, strict=True)}

    points = list(table_of("roc").round(4).itertuples(index=False, name=None))

    assert set(points) <= curve
    assert points[0][0] == 0
    assert points[-1] == (1, 1)


@pytest.mark.usefixtures("project")
def test_the_bin_with_a_sibling_in_train_is_counted_apart() -> None:
    table = predictions().assign(right=lambda rows: rows["actual"] == rows["predicted"])

    rows = table_of("siblings").set_index("siblings_in_train")

    # Not also 2, whose twin by number is in train.
    assert rows["test_bins"].to_dict() == {"with": 1, "without": 6, "difference": 7}
    # Of the quantity of the one, which both halves have.
    alike = table[table["actual"] == table["actual"].iloc[0]]
    assert rows.loc["with", "accuracy"] == alike["right"].iloc[0]
    assert rows.loc["without", "accuracy"] == pytest.approx(alike["right"].iloc[1:].mean())


def test_evaluating_again_gives_the_same_bytes_and_says_the_accuracy(project: Path) -> None:
    before = files_of(project)

    summary = evaluate.main("vit")

    assert files_of(project) == before
    assert f"accuracy {metrics()['accuracy']:.4g}" in summary


class Other:
    """Another project with the same model, and data of its own."""

    def __init__(self, project: Path, folder: Path) -> None:
        self.folder = folder
        write_knobs(folder)
        shutil.copytree(project / "models", folder / "models")

    def evaluate(self, rows: list[dict[str, Any]], sets: list[str] = SETS) -> dict[str, bytes]:
        write_data(self.folder, rows, sets)
        evaluate.main("vit")
        return files_of(self.folder)


@pytest.fixture
def other(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Other:
    monkeypatch.chdir(tmp_path)
    return Other(project, tmp_path)


def with_other_labels(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["quantity"] = row["quantity"] % 3 + 1


def with_other_photographs(rows: list[dict[str, Any]]) -> None:
    for row, other_row in zip(rows, bin_rows([3] * len(rows)), strict=True):
        row["image"] = other_row["image"]


def without_most(rows: list[dict[str, Any]]) -> None:
    del rows[2:]


@pytest.mark.parametrize("change", [with_other_labels, with_other_photographs, without_most])
def test_test_chooses_neither_temperature_nor_threshold(
    change: Callable[[list[dict[str, Any]]], None], evaluated: Path, other: Other
) -> None:
    before = files_of(evaluated)
    rows = project_rows()
    test = rows[-len(TEST) :]
    change(test)

    after = other.evaluate([*rows[: -len(TEST)], *test], SETS[: len(rows) - len(TEST) + len(test)])

    for name in CHOSEN:
        assert after[name] == before[name], name
    thresholds = [pd.read_csv(folder / REPORTS / "alarms.csv") for folder in (evaluated, Path())]
    assert thresholds[0]["threshold"][0] == thresholds[1]["threshold"][0]
    # While what is measured on test is another.
    for name in ("predictions.csv", "metrics.json", "intervals.csv", "roc.csv", "card"):
        assert after[name] != before[name], name


def test_validation_chooses_temperature_and_threshold(evaluated: Path, other: Other) -> None:
    before = files_of(evaluated)
    rows = project_rows()
    with_other_labels(rows[len(TRAIN) : -len(TEST)])

    after = other.evaluate(rows)

    for name in (*CHOSEN, "alarms.csv", "predictions.csv", "card"):
        assert after[name] != before[name], name
    # But not the counts that are predicted.
    for name in ("confusion.csv", "per_quantity.csv", "siblings.csv"):
        assert after[name] == before[name], name


def test_a_sibling_in_validation_is_one_that_was_seen(other: Other) -> None:
    other.evaluate(project_rows(), ["validation", *SETS[1:]])

    assert table_of("siblings")["test_bins"].tolist() == [1, 6, 7]


def test_the_size_of_a_batch_does_not_matter(evaluated: Path, other: Other) -> None:
    write_knobs(other.folder, batch_size=100)

    other.evaluate(project_rows())

    before, after = (
        read_csv(folder / REPORTS / "predictions.csv") for folder in (evaluated, Path())
    )
    pd.testing.assert_frame_equal(after, before, rtol=1e-4)


@pytest.mark.usefixtures("project")
def test_the_model_card_has_the_numbers_of_the_intervals() -> None:
    text = Path("models/vit.md").read_text("utf-8")
    rows = table_of("intervals").set_index("metric")

    head: Any = ModelCard(text).data

    assert (head.model_name, head.library_name) == ("vit", "transformers")
    found = {result.metric_type: result.metric_value for result in head.eval_results}
    assert found == pytest.approx({name: rows["value"][name] for name in found}, abs=1e-4)
    assert {"accuracy", "rmse", "auroc"} <= found.keys()
    lines = text.splitlines()
    for name, row in rows.iterrows():
        (line,) = (line for line in lines if line.startswith(f"| {name} | "))
        numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", line)]
        assert numbers == pytest.approx([row["value"], row["low"], row["high"]], abs=1e-4)
    assert "25 bins to train, 8 to calibrate and choose thresholds, 7 to test" in text
    assert f"temperature of {settings()['temperature']:.3f}, " in text
    assert "(pad)" in text


@pytest.mark.usefixtures("project")
def test_the_release_is_the_model_with_its_calibration() -> None:
    release = load_release(Path("models/vit"))

    assert release.settings == Settings(**settings())
    assert (release.settings.fit, release.settings.quality) == ("pad", 80)
    assert release.classifier.labels == [1, 2, 3]
    pd.testing.assert_frame_equal(release.validation, table_of("validation"))
    (bins,) = load_bins(Path("data/resized"), Path("data/split.csv"), "test")
    raw = score(release.classifier, bins, 100).probabilities
    calibrated = release.calibrated(raw.astype(np.float64))
    np.testing.assert_allclose(calibrated, predictions()[COLUMNS], atol=1e-5)
    # Who has the release chooses the same threshold, to the digits that are written.
    right = np.array([row[f"p{row['actual']}"] for _, row in release.validation.iterrows()])
    threshold = table_of("alarms")["threshold"][0]
    assert threshold_for(right, 0.3) == pytest.approx(threshold, rel=1e-5)


def test_settings_come_back_as_they_were_written(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "models/vit", tmp_path / "models/vit")
    written = Settings(
        temperature=1.2345678901234567,
        fit="squeeze",
        quality=93,
        sha256=digests_of(tmp_path / "models/vit"),
    )
    shares = {"p1": [0.5, 0.25], "p2": [0.5, 0.125], "p3": [0.0, 0.625]}
    table = pd.DataFrame({"id": ["00100", "100"], "actual": [1, 3], **shares})
    write_settings(tmp_path / REPORTS, written, table)

    release = load_release(tmp_path / "models/vit")

    assert release.settings == written
    pd.testing.assert_frame_equal(release.validation, table)
    network = load_release(project / "models/vit").classifier.network
    assert equal(weights_of(release.classifier.network), weights_of(network))


@pytest.mark.parametrize("missing", ["models/vit", "reports/vit/inference.json", "reports/vit"])
def test_a_release_without_a_part_is_a_missing_input(
    project: Path, tmp_path: Path, missing: str
) -> None:
    shutil.copytree(project / "models/vit", tmp_path / "models/vit")
    shutil.copytree(project / REPORTS, tmp_path / REPORTS)
    path = tmp_path / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()

    with pytest.raises(FileNotFoundError, match=re.escape(missing)):
        load_release(tmp_path / "models/vit")


@pytest.mark.usefixtures("project")
def test_a_model_that_was_not_trained_is_a_missing_input() -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("models/resnet34")):
        evaluate.main("resnet34")


@pytest.mark.parametrize("place", [1, 2])
def test_bins_with_a_quantity_that_the_model_does_not_know_are_refused(
    place: int, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_knobs(tmp_path)
    (tmp_path / "models").symlink_to(project / "models")
    quantities = [1, 2, 3]
    quantities[place] = 5
    write_data(tmp_path, bin_rows(quantities), ["train", "validation", "test"])
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UserError, match=r"knows the quantities \[1, 2, 3\], not \[5\]"):
        evaluate.main("vit")
    assert not Path("reports").exists()


@pytest.mark.parametrize(
    ("in_train", "majority"), [([1, 3, 3, 2], 3), ([5, 4, 4, 5, 1], 4), ([2], 2)]
)
def test_the_majority_is_trains_most_frequent_and_the_smaller_of_equals(
    in_train: list[int], majority: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = bin_rows([*in_train, 1, 1, 1, 1, 1, 1])
    write_resized(tmp_path / "data/resized", rows)
    names = ["train"] * len(in_train) + ["validation"] * 3 + ["test"] * 2
    # The last one is in no set: not counted.
    ids = [row["id"] for row in rows[:-1]]
    write_split(tmp_path / "data/split.csv", dict(zip(ids, names, strict=True)))
    monkeypatch.chdir(tmp_path)

    assert evaluate.majority_quantity(read_csv(Path("data/split.csv"))) == majority
