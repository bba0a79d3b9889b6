"""Count items without a network, by histograms of colors and edges and a linear classifier.

What a network is worth is what it has beyond this baseline. The classifier is fitted on train; its
regularization and its temperature are chosen on validation, and test is used for measuring only.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline

from stages.features.histograms import photograph_features
from stages.features.projection import Features, fit_projection, project
from stages.formats.tables import read_csv
from stages.imaging.loader import Bins, load_bins
from stages.networks.calibration import (
    Counts,
    Floats,
    fit_temperature,
    negative_log_likelihood,
    positions_of,
)
from stages.runtime import paths
from stages.runtime.command import run_stage
from stages.runtime.errors import UserError
from stages.runtime.params import load_params
from stages.scoring.results import BASELINE, publish_evaluation
from stages.scoring.scored import Scored

COMPONENTS = 128
# Values of scikit-learn's C: the smaller, the stronger the regularization.
REGULARIZATIONS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1)


class Examples(NamedTuple):
    """A set of bins for the classifier: `features` [bins, components] and `targets` [bins].

    A target is the position of the bin's quantity among the labels.
    """

    bins: Bins
    features: Features
    targets: Counts


def main() -> str:
    params = load_params()
    sets, labels = read_csv(paths.SPLIT), params.subset.quantities
    names, size = ["train", "validation", "test"], params.resize.size
    loaded = load_bins(paths.RESIZED, paths.SPLIT, *names, size=size, stage=BASELINE)
    projection = fit_projection(loaded[0], COMPONENTS, photograph_features, BASELINE)
    train, validation, test = (make_examples(projection, bins, labels) for bins in loaded)
    classifier = choose_classifier(train, validation, labels)
    scored = [score(classifier, examples, labels, sets) for examples in (validation, test)]
    temperature = fit_temperature(scored[0].probabilities, scored[0].targets)
    validated, tested = (some.with_temperature(temperature) for some in scored)
    return publish_evaluation(BASELINE, validated, tested, temperature, params.evaluate).summary


def make_examples(projection: Pipeline, bins: Bins, labels: list[int]) -> Examples:
    """Raises UserError if the quantity of a bin is not among the labels."""
    targets = positions_of(bins.quantities, labels)
    features = project(projection, bins, photograph_features, BASELINE)
    return Examples(bins, features, targets)


def choose_classifier(
    train: Examples, validation: Examples, labels: list[int]
) -> LogisticRegression:
    """Fit one classifier for each regularization, and return the best one on validation.

    Raises UserError if all bins of train have the same quantity.
    """
    if len(np.unique(train.targets)) < 2:
        raise UserError(
            f"all bins that {paths.SPLIT} puts in train have {labels[train.targets[0]]} items, so"
            " there is nothing to learn: put bins with another count in train"
        )
    fitted = [
        LogisticRegression(C=strength, max_iter=1000).fit(train.features, train.targets)
        for strength in REGULARIZATIONS
    ]

    def loss(classifier: LogisticRegression) -> float:
        probabilities = predict(classifier, validation, labels)
        return float(negative_log_likelihood(probabilities, validation.targets).mean())

    return min(fitted, key=loss)


def predict(classifier: LogisticRegression, examples: Examples, labels: list[int]) -> Floats:
    """The probabilities [bins, labels]; a label that no bin of train has gets 0."""
    probabilities = np.zeros((len(examples.bins), len(labels)))
    probabilities[:, classifier.classes_] = classifier.predict_proba(examples.features)
    return probabilities


def score(
    classifier: LogisticRegression, examples: Examples, labels: list[int], sets: pd.DataFrame
) -> Scored:
    """The classifier's scores of a set, before calibration."""
    bins = examples.bins
    return Scored(
        ids=bins.ids,
        groups=sets.set_index("id")["group"][bins.ids].tolist(),
        actual=bins.quantities,
        probabilities=predict(classifier, examples, labels),
        labels=labels,
    )


if __name__ == "__main__":
    run_stage(BASELINE, main)
