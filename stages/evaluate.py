"""Score one model on the test bins: metrics with intervals, predictions, tables of the plots.

Validation calibrates its probabilities and chooses the threshold of its alarms; test only measures.
"""

import numpy as np
import pandas as pd

from stages.formats.tables import read_csv, write_csv, write_json
from stages.imaging.loader import load_bins
from stages.networks.classifier import load_classifier
from stages.networks.inference import default_device, evaluate, place
from stages.networks.release import Settings, digests_of, write_settings
from stages.runtime import paths
from stages.runtime.command import run_stage
from stages.runtime.files import write_text
from stages.runtime.params import load_params
from stages.scoring.card import model_card
from stages.scoring.evaluation import Scored, evaluate_scores


def main(model: str) -> str:
    params = load_params()
    sets = read_csv(paths.SPLIT)
    digests = digests_of(paths.MODELS / model)
    validation, test = score(model, sets, params.evaluate.batch_size)
    seen_groups = set(sets.loc[sets["set"] != "test", "group"])
    evaluation = evaluate_scores(validation, test, params.evaluate.false_alarm, seen_groups)
    metrics = evaluation.metrics | {
        "majority_accuracy": float((test.actual == majority_quantity(sets)).mean()),
        "test_bins": len(test.ids),
    }
    for name, table in evaluation.tables.items():
        write_csv(paths.REPORTS / model / f"{name}.csv", table)
    write_json(paths.REPORTS / model / "metrics.json", metrics)
    settings = Settings(
        temperature=evaluation.temperature,
        fit=params.resize.fit,
        quality=params.resize.quality,
        sha256=digests,
    )
    write_settings(paths.REPORTS / model, settings, evaluation.validation)
    write_text(paths.MODELS / f"{model}.md", model_card(model, params, sets, evaluation.tables))
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def score(model: str, sets: pd.DataFrame, batch_size: int) -> list[Scored]:
    """The model's scores of validation and of test, as they come out of the network."""
    classifier = load_classifier(paths.MODELS / model)
    loaded = load_bins(paths.RESIZED, paths.SPLIT, "validation", "test", stage=f"evaluate {model}")
    place(classifier, default_device())
    groups = sets.set_index("id")["group"]
    return [
        Scored(
            bins.ids,
            groups[bins.ids].tolist(),
            bins.quantities,
            evaluate(classifier, bins, batch_size).probabilities.astype(np.float64),
            classifier.labels,
        )
        for bins in loaded
    ]


def majority_quantity(sets: pd.DataFrame) -> int:
    """The most frequent quantity in train, the smaller of equals."""
    bins = pd.read_parquet(paths.RESIZED, columns=["id", "quantity"])
    train = bins[bins["id"].isin(sets.loc[sets["set"] == "train", "id"])]
    return int(train["quantity"].mode().iloc[0])


if __name__ == "__main__":
    run_stage("evaluate", main, model="a key of params.yaml's train block")
