"""The evaluate stage, on a small model of the train stage."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics

from stages import evaluate, pretrained, train
from stages.core.command import UserError
from tests.made import TINY_VIT, bin_rows, write_params, write_resized, write_split

TRAIN = [1, 2, 3] * 8 + [2]
TEST = [1, 2, 1, 3, 1, 2, 1]
REPORTS = Path("reports/vit")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a trained model that was evaluated: half right, as it is half trained."""
    folder = tmp_path_factory.mktemp("project")
    write_params(
        folder,
        {
            "train.vit.pretrained": False,
            "train.vit.config": TINY_VIT,
            "train.vit.epochs": 2,
            "train.vit.batch_size": 8,
            "train.vit.warmup_steps": 0,
            "train.vit.learning_rate": 0.003,
            "evaluate.batch_size": 3,
        },
    )
    rows = bin_rows(TRAIN + TEST)
    rows[-2]["id"], rows[-1]["id"] = "00100", "100"
    write_resized(folder / "data/resized", rows)
    sets = ["train"] * len(TRAIN) + ["test"] * len(TEST)
    write_split(
        folder / "data/split.csv", {row["id"]: name for row, name in zip(rows, sets, strict=True)}
    )
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


def predictions() -> pd.DataFrame:
    return pd.read_csv(REPORTS / "predictions.csv", dtype={"id": str})


def metrics() -> dict[str, Any]:
    values: dict[str, Any] = json.loads((REPORTS / "metrics.json").read_text())
    return values


@pytest.mark.usefixtures("project")
def test_each_test_bin_has_a_row_with_its_id_as_it_is() -> None:
    table = predictions()

    assert table.columns.tolist() == ["id", "actual", "predicted", "p1", "p2", "p3"]
    assert table["id"].tolist() == ["00026", "00027", "00028", "00029", "00030", "00100", "100"]
    assert table["actual"].tolist() == TEST


@pytest.mark.usefixtures("project")
def test_probabilities_sum_to_1_and_the_highest_is_the_prediction() -> None:
    table = predictions()
    probabilities = table[["p1", "p2", "p3"]].to_numpy()

    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert table["predicted"].tolist() == (probabilities.argmax(axis=1) + 1).tolist()


@pytest.mark.usefixtures("project")
def test_the_metrics_are_those_of_the_predictions() -> None:
    table = predictions()
    actual, predicted = table["actual"], table["predicted"]
    absolute_error = (actual - predicted).abs()
    reliability = pd.read_csv(REPORTS / "reliability.csv")
    gap = (reliability["accuracy"] - reliability["confidence"]).abs()

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
            "test_bins": 7,
            "ece": (gap * reliability["test_bins"]).sum() / 7,
        },
        rel=1e-5,
    )


@pytest.mark.usefixtures("project")
def test_recall_and_precision_per_quantity_are_those_of_the_predictions() -> None:
    table = predictions()
    precision, recall, _, bins = sklearn.metrics.precision_recall_fscore_support(
        table["actual"], table["predicted"], labels=[1, 2, 3], zero_division=0
    )

    rows = pd.read_csv(REPORTS / "per_quantity.csv")

    assert rows.columns.tolist() == ["quantity", "recall", "precision", "test_bins"]
    assert rows["quantity"].tolist() == [1, 2, 3]
    assert rows["test_bins"].tolist() == bins.tolist() == [4, 2, 1]
    np.testing.assert_allclose(rows["recall"], recall, atol=1e-5)
    np.testing.assert_allclose(rows["precision"], precision, atol=1e-5)


@pytest.mark.usefixtures("project")
def test_confusion_has_a_row_for_each_pair_of_counts() -> None:
    table = predictions()
    expected = sklearn.metrics.confusion_matrix(table["actual"], table["predicted"])

    rows = pd.read_csv(REPORTS / "confusion.csv")

    assert rows.columns.tolist() == ["actual", "predicted", "test_bins"]
    assert rows["actual"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert rows["predicted"].tolist() == [1, 2, 3] * 3
    assert rows["test_bins"].tolist() == expected.ravel().tolist()


@pytest.mark.usefixtures("project")
def test_reliability_is_that_of_the_predictions() -> None:
    table = predictions()
    confidence = table[["p1", "p2", "p3"]].max(axis=1)

    rows = pd.read_csv(REPORTS / "reliability.csv")

    assert rows["test_bins"].sum() == 7
    weighted = rows[["confidence", "accuracy"]].mul(rows["test_bins"], axis=0).sum() / 7
    assert weighted["confidence"] == pytest.approx(confidence.mean(), rel=1e-4)
    assert weighted["accuracy"] == pytest.approx(metrics()["accuracy"], rel=1e-4)


@pytest.mark.usefixtures("project")
def test_the_saved_model_scores_as_it_did_after_its_last_epoch() -> None:
    curves = pd.read_csv(REPORTS / "curves.csv")

    assert curves.columns.tolist() == [
        "epoch",
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
    ]
    assert curves["epoch"].tolist() == [1, 2]
    assert curves["test_accuracy"].iloc[-1] == pytest.approx(metrics()["accuracy"], abs=1e-5)
    table = predictions()
    of_actual = [row[f"p{row['actual']}"] for _, row in table.iterrows()]
    loss = -np.log(of_actual).mean()
    assert curves["test_loss"].iloc[-1] == pytest.approx(loss, rel=1e-3)


@pytest.mark.usefixtures("project")
def test_evaluating_again_gives_the_same_bytes_and_says_the_accuracy() -> None:
    names = [
        "confusion.csv",
        "metrics.json",
        "per_quantity.csv",
        "predictions.csv",
        "reliability.csv",
    ]
    before = [(REPORTS / name).read_bytes() for name in names]

    summary = evaluate.main("vit")

    assert [(REPORTS / name).read_bytes() for name in names] == before
    assert f"accuracy {metrics()['accuracy']:.4g}" in summary


@pytest.mark.usefixtures("project")
def test_a_model_that_was_not_trained_is_a_missing_input() -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("models/resnet34")):
        evaluate.main("resnet34")


def test_bins_with_a_quantity_that_the_model_does_not_know_are_refused(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params(tmp_path, {})
    (tmp_path / "models").symlink_to(project / "models")
    rows = bin_rows([1, 5])
    write_resized(tmp_path / "data/resized", rows)
    write_split(tmp_path / "data/split.csv", {"00001": "train", "00002": "test"})
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
    rows = bin_rows([*in_train, 1, 1, 1, 1, 1])
    write_resized(tmp_path / "data/resized", rows)
    sets = {row["id"]: "test" for row in rows} | {
        row["id"]: "train" for row in rows[: len(in_train)]
    }
    # In no set: not counted.
    sets.pop(rows[-1]["id"])
    write_split(tmp_path / "data/split.csv", sets)
    monkeypatch.chdir(tmp_path)

    assert evaluate.majority_quantity() == majority
