"""Score one model on the test bins: metrics with intervals, tables for the plots, a model card.

The model was calibrated on validation, and the thresholds of the alarms are chosen on it. The test
bins are used for measuring only.
"""

import numpy as np
import pandas as pd

from stages.formats.tables import read_csv
from stages.imaging.loader import Bins, load_bins
from stages.networks.backbone_classifier import BackboneClassifier
from stages.networks.classifier import Classifier
from stages.networks.inference import default_device, evaluate, place
from stages.networks.release import load_release
from stages.runtime import paths
from stages.runtime.command import run_stage
from stages.runtime.files import write_text
from stages.runtime.params import load_params
from stages.scoring.card import model_card
from stages.scoring.results import PLOTS, publish_evaluation
from stages.scoring.scored import Scored


def main(model: str) -> str:
    params = load_params()
    sets = read_csv(paths.SPLIT)
    release = load_release(paths.MODELS / model)
    (bins,) = load_bins(
        paths.RESIZED, paths.SPLIT, "test", size=params.resize.size, stage=f"evaluate {model}"
    )
    evaluation = publish_evaluation(
        model,
        Scored.from_table(release.validation),
        score(release.classifier, bins, sets, params.evaluate.batch_size),
        release.settings.folded_temperature,
        params.evaluate,
        PLOTS,
    )
    classifier, model_params = release.classifier, params.model(model)
    card = model_card(
        model,
        params,
        release.settings.epoch,
        sets,
        evaluation.tables,
        # A pipeline knows neither a head of our own nor mirrored images.
        for_pipeline=model_params.library == "transformers"
        and not isinstance(classifier.network, BackboneClassifier)
        and not classifier.average_mirrored,
    )
    write_text(paths.MODELS / f"{model}.md", card)
    return evaluation.summary


def score(classifier: Classifier, bins: Bins, sets: pd.DataFrame, batch_size: int) -> Scored:
    """The model's calibrated scores of the bins."""
    place(classifier, default_device())
    probabilities = evaluate(classifier, bins, batch_size).probabilities
    return Scored(
        ids=bins.ids,
        groups=sets.set_index("id")["group"][bins.ids].tolist(),
        actual=bins.quantities,
        probabilities=probabilities.astype(np.float64),
        labels=classifier.labels,
    )


if __name__ == "__main__":
    run_stage("evaluate", main, model="a key of params.yaml's train block")
