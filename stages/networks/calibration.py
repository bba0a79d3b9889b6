"""Temperature scaling: adjusting probabilities so that they are as often right as they say."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from stages.runtime.errors import UserError

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

# Wider than any network needs: at 0.05 nearly every prediction is certain, at 20 all are alike.
LOWEST, HIGHEST = 0.05, 20.0
# Logarithms are taken of at least this probability, because a float32 softmax can underflow to 0.
TINY = float(np.finfo(np.float32).tiny)


def fit_temperature(probabilities: NDArray[np.floating], targets: Counts) -> float:
    """The temperature with the least negative log-likelihood of `targets` [bins].

    `probabilities` [bins, labels] are a softmax of logits. Their logarithms differ from the logits
    by a constant per bin, which does not matter. Guo et al., On Calibration of Modern Neural
    Networks, 2017 (arXiv:1706.04599), section 4.2. The loss is convex in 1 / temperature, so it has
    one minimum.

    Targets are smoothed as in Platt, Probabilities for SV Machines, 1999, section 2.2: a network
    that is right on all of a few bins would otherwise be certain of every answer.
    """
    smoothing = 1 / (len(targets) + 2)

    def loss(log_temperature: float) -> float:
        calibrated = with_temperature(probabilities, float(np.exp(log_temperature)))
        of_targets = negative_log_likelihood(calibrated, targets).mean()
        of_all_labels = -np.log(np.maximum(calibrated, TINY)).mean()
        return float((1 - smoothing) * of_targets + smoothing * of_all_labels)

    found = minimize_scalar(loss, bounds=(np.log(LOWEST), np.log(HIGHEST)), method="bounded")
    return float(np.exp(found.x))


def with_temperature(probabilities: NDArray[np.floating], temperature: float) -> Floats:
    """The softmax of the same logits divided by the temperature, [bins, labels]."""
    logits = np.log(np.maximum(np.float64(probabilities), TINY)) / temperature
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    calibrated: Floats = exponentials / exponentials.sum(axis=1, keepdims=True)
    return calibrated


def negative_log_likelihood(probabilities: NDArray[np.floating], targets: Counts) -> Floats:
    """-log of the probability of each bin's target, in nats."""
    chosen = probabilities[np.arange(len(targets)), targets].astype(np.float64)
    likelihood: Floats = -np.log(np.maximum(chosen, TINY))
    return likelihood


def positions_of(counts: Counts, labels: Sequence[int]) -> Counts:
    """The position of each count among the labels. Raises UserError if one is not among them."""
    is_label = counts[:, None] == np.array(labels)
    if not is_label.any(axis=1).all():
        unknown = np.unique(counts[~is_label.any(axis=1)])
        raise UserError(f"the model knows the quantities {list(labels)}, not {unknown.tolist()}")
    positions: Counts = is_label.argmax(axis=1)
    return positions


def probability_columns(labels: list[int]) -> list[str]:
    """The names of the columns with the probabilities of the labels."""
    return [f"p{label}" for label in labels]
