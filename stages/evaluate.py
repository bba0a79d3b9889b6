"""Score one model on the test bins: metrics, predictions, and the tables of its plots."""

from pathlib import Path

import numpy as np
import pandas as pd

from stages.core.command import run_stage
from stages.core.files import read_csv, write_csv, write_json
from stages.core.inference import default_device, evaluate, place
from stages.core.loader import load_bins
from stages.core.metrics import (
    Counts,
    confusion_matrix,
    expected_calibration_error,
    headline_metrics,
    recall_and_precision,
    reliability_table,
)
from stages.core.networks import load_classifier
from stages.core.params import load_params

RESIZED = Path("data/resized")
SPLIT = Path("data/split.csv")
MODELS = Path("models")
REPORTS = Path("reports")


def main(model: str) -> str:
    batch_size = load_params().evaluate.batch_size
    test_bins = load_bins(RESIZED, SPLIT, "test")
    classifier = load_classifier(MODELS / model)
    place(classifier, default_device())
    scores = evaluate(classifier, test_bins, batch_size)

    labels = classifier.labels
    actual = test_bins.quantities
    predicted = np.array(labels)[scores.probabilities.argmax(axis=1)]
    confusion = confusion_matrix(actual, predicted, labels)
    reliability = reliability_table(predicted == actual, scores.probabilities.max(axis=1))
    predictions = pd.DataFrame(
        {"id": test_bins.ids, "actual": actual, "predicted": predicted}
        | {f"p{label}": scores.probabilities[:, place] for place, label in enumerate(labels)}
    )
    metrics = headline_metrics(actual, predicted, labels, majority_quantity())
    metrics["ece"] = expected_calibration_error(reliability)
    write_csv(REPORTS / model / "confusion.csv", confusion_table(confusion, labels))
    write_csv(REPORTS / model / "per_quantity.csv", per_quantity_table(confusion, labels))
    write_csv(REPORTS / model / "predictions.csv", predictions)
    write_csv(REPORTS / model / "reliability.csv", reliability)
    write_json(REPORTS / model / "metrics.json", metrics)
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def confusion_table(confusion: Counts, labels: list[int]) -> pd.DataFrame:
    """A row for each pair of counts, also those that did not occur."""
    pairs = pd.MultiIndex.from_product([labels, labels], names=["actual", "predicted"])
    return pd.DataFrame({"test_bins": confusion.ravel()}, index=pairs).reset_index()


def per_quantity_table(confusion: Counts, labels: list[int]) -> pd.DataFrame:
    recall, precision = recall_and_precision(confusion)
    return pd.DataFrame(
        {
            "quantity": labels,
            "recall": recall,
            "precision": precision,
            "test_bins": confusion.sum(axis=1),
        }
    )


def majority_quantity() -> int:
    """The most frequent quantity in train, the smaller of equals."""
    bins = pd.read_parquet(RESIZED, columns=["id", "quantity"])
    sets = read_csv(SPLIT)
    train = bins[bins["id"].isin(sets.loc[sets["set"] == "train", "id"])]
    return int(train["quantity"].mode().iloc[0])


if __name__ == "__main__":
    run_stage("evaluate", main, model="a key of params.yaml's train block")
