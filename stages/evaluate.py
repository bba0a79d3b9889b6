"""Score one model on the test bins: metrics with intervals, tables for the plots, a model card.

The temperature was fitted on validation, and the threshold of the alarms is chosen on it. The test
bins are used for measuring only.
"""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from stages.formats.items import ASINS, asins_by_bin
from stages.formats.shards import whole_parquet
from stages.formats.tables import read_csv
from stages.imaging.loader import Bins, load_bins
from stages.networks.classifier import Classifier
from stages.networks.inference import default_device, evaluate, place
from stages.networks.release import load_release
from stages.runtime import paths
from stages.runtime.command import run_stage
from stages.runtime.files import write_text
from stages.runtime.params import load_params
from stages.scoring.card import model_card
from stages.scoring.evaluation import Scored, evaluate_scores
from stages.scoring.results import write_results


def main(model: str) -> str:
    params = load_params()
    sets = read_csv(paths.SPLIT)
    release = load_release(paths.MODELS / model)
    (bins,) = load_bins(
        paths.RESIZED, paths.SPLIT, "test", size=params.resize.size, stage=f"evaluate {model}"
    )
    test = score(release.classifier, bins, sets, params.evaluate.batch_size)
    evaluation = evaluate_scores(
        release.validation,
        test,
        release.settings.folded_temperature,
        params.evaluate.false_alarm,
        shared={"siblings": bins_with_siblings(sets), "products": bins_with_products(sets)},
    )
    metrics = evaluation.metrics | {
        "majority_accuracy": float((test.actual == majority_quantity(sets)).mean()),
        "test_bins": len(test.ids),
    }
    write_results(paths.REPORTS / model, metrics, evaluation.tables)
    card = model_card(model, params, release.settings.epoch, sets, evaluation.tables)
    write_text(paths.MODELS / f"{model}.md", card)
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def score(classifier: Classifier, bins: Bins, sets: pd.DataFrame, batch_size: int) -> Scored:
    """The model's scores of the bins, before calibration."""
    place(classifier, default_device())
    probabilities = evaluate(classifier, bins, batch_size).probabilities
    return Scored(
        ids=bins.ids,
        groups=sets.set_index("id")["group"][bins.ids].tolist(),
        actual=bins.quantities,
        probabilities=probabilities.astype(np.float64),
        labels=classifier.labels,
    )


def bins_with_siblings(sets: pd.DataFrame) -> set[str]:
    """The test bins with a sibling in train or validation."""
    tested = sets["set"] == "test"
    seen = sets["group"].isin(sets.loc[~tested, "group"])
    return set(sets.loc[tested & seen, "id"])


def bins_with_products(sets: pd.DataFrame) -> set[str]:
    """The test bins that share a product (an ASIN) with a bin of train or validation."""
    with whole_parquet(paths.INDEX):
        index = pq.ParquetFile(paths.INDEX).read(["id", ASINS])
    products = asins_by_bin(index)
    products["id"] = index["id"].take(pa.array(products["bin"]))
    products = products.dropna().merge(sets[["id", "set"]], on="id")
    tested = products["set"] == "test"
    seen = products["asin"].isin(products.loc[~tested, "asin"])
    return set(products.loc[tested & seen, "id"])


def majority_quantity(sets: pd.DataFrame) -> int:
    """The most frequent quantity in train, the smallest one if several are equally frequent."""
    bins = pd.read_parquet(paths.RESIZED, columns=["id", "quantity"])
    train = bins[bins["id"].isin(sets.loc[sets["set"] == "train", "id"])]
    return int(train["quantity"].mode().iloc[0])


if __name__ == "__main__":
    run_stage("evaluate", main, model="a key of params.yaml's train block")
