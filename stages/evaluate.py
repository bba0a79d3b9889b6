"""Score one model on the test bins: metrics, recall and precision per quantity, predictions."""

from pathlib import Path

import numpy as np
import pandas as pd

from stages.core.command import run_stage
from stages.core.files import read_csv, write_csv, write_json
from stages.core.inference import default_device, evaluate, place
from stages.core.loader import load_bins
from stages.core.metrics import confusion_matrix, headline_metrics, recall_and_precision
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
    metrics = headline_metrics(actual, predicted, labels, majority_quantity())
    recall, precision = recall_and_precision(confusion_matrix(actual, predicted, labels))
    per_quantity = pd.DataFrame(
        {
            "quantity": labels,
            "recall": recall,
            "precision": precision,
            "test_bins": [int((actual == label).sum()) for label in labels],
        }
    )
    predictions = pd.DataFrame(
        {"id": test_bins.ids, "actual": actual, "predicted": predicted}
        | {f"p{label}": scores.probabilities[:, place] for place, label in enumerate(labels)}
    )
    write_csv(REPORTS / model / "per_quantity.csv", per_quantity)
    write_csv(REPORTS / model / "predictions.csv", predictions)
    write_json(REPORTS / model / "metrics.json", metrics)
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def majority_quantity() -> int:
    """The most frequent quantity in train, the smaller of equals."""
    bins = pd.read_parquet(RESIZED, columns=["id", "quantity"])
    sets = read_csv(SPLIT)
    train = bins[bins["id"].isin(sets.loc[sets["set"] == "train", "id"])]
    return int(train["quantity"].mode().iloc[0])


if __name__ == "__main__":
    run_stage("evaluate", main, model="a key of params.yaml's train block")
