"""Temperature scaling, compared with SciPy and with results worked by hand."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from stages.networks.calibration import (
    HIGHEST,
    LOWEST,
    fit_temperature,
    negative_log_likelihood,
    positions_of,
    with_temperature,
)
from stages.runtime.counts import AndMore
from stages.runtime.errors import UserError

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


def random_logits(seed: int, bins: int = 400, spread: float = 2.0) -> Floats:
    """[bins, labels], plus a constant for each bin, which does not change its softmax."""
    chance = np.random.default_rng(seed)
    return chance.normal(0, spread, (bins, 5)) + chance.normal(0, 10, (bins, 1))


def sampled_targets(probabilities: Floats, seed: int) -> Counts:
    """A label for each row, sampled from its probabilities."""
    chance = np.random.default_rng([seed, 1]).random((len(probabilities), 1))
    positions = (probabilities.cumsum(axis=1) < chance).sum(axis=1)
    targets: Counts = positions.clip(max=probabilities.shape[1] - 1)
    return targets


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_fitted_temperature_is_that_of_scipys_minimizer_on_logits(
    true: float, seed: int
) -> None:
    logits = random_logits(seed)
    targets = sampled_targets(softmax(logits / true, axis=1), seed)

    fitted = fit_temperature(softmax(logits, axis=1), targets)

    def loss(parameters: Floats) -> float:
        logs = log_softmax(logits / np.exp(parameters[0]), axis=1)
        share = 1 / (len(targets) + 2)
        smoothed = (1 - share) * np.eye(5)[targets] + share / 5
        return float(-(smoothed * logs).sum(axis=1).mean())

    found = minimize(loss, [0.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12})
    assert fitted == pytest.approx(float(np.exp(found.x[0])), rel=1e-3)


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_found_again(true: float) -> None:
    logits = random_logits(7, bins=20_000)
    targets = sampled_targets(softmax(logits / true, axis=1), 7)

    fitted = fit_temperature(softmax(logits, axis=1).astype(np.float32), targets)

    assert fitted == pytest.approx(true, rel=0.04)


@pytest.mark.parametrize("temperature", [LOWEST, 0.2, 1.0, 1.7, HIGHEST])
def test_a_temperature_divides_the_logits(temperature: float) -> None:
    logits = random_logits(2)

    calibrated = with_temperature(softmax(logits, axis=1), temperature)

    np.testing.assert_allclose(calibrated, softmax(logits / temperature, axis=1), atol=1e-12)


def test_a_temperature_worked_by_hand() -> None:
    # Half the logits give the square roots of the probabilities, up to a factor.
    calibrated = with_temperature(np.array([[0.64, 0.32, 0.04]]), 2.0)

    roots = np.array([0.8, 0.32**0.5, 0.2])
    np.testing.assert_allclose(calibrated, [roots / roots.sum()])


def test_probabilities_of_0_are_calibrated_too() -> None:
    # A float32 softmax of logits this far apart has zeros, even for some targets.
    probabilities = softmax(np.float32(random_logits(4, spread=80.0)), axis=1)
    targets = sampled_targets(softmax(random_logits(4, spread=1.0), axis=1), 4)
    assert (probabilities[np.arange(len(targets)), targets] == 0).any()

    temperature = fit_temperature(probabilities, targets)
    calibrated = with_temperature(probabilities, temperature)

    assert 10 < temperature <= HIGHEST
    # At a temperature this high every label is possible.
    assert (calibrated > 1e-9).all()
    np.testing.assert_allclose(calibrated.sum(axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize("bins", [10, 100, 1000])
def test_a_network_that_is_always_right_is_not_taken_for_certain(bins: int) -> None:
    probabilities = np.tile([0.8, 0.1, 0.1], (bins, 1))

    temperature = fit_temperature(probabilities, np.zeros(bins, int))

    doubt = 1 - with_temperature(probabilities, temperature)[0, 0]
    assert doubt == pytest.approx(2 / 3 / (bins + 2), rel=0.01)


def test_a_network_that_is_always_wrong_ends_at_the_end_of_the_range() -> None:
    probabilities = np.array([[0.6, 0.4], [0.3, 0.7]])

    assert fit_temperature(probabilities, np.array([1, 0])) == pytest.approx(HIGHEST, rel=1e-3)


def test_a_likelihood_worked_by_hand() -> None:
    probabilities = np.array([[0.5, 0.5], [0.0, 1.0], [0.9, 0.1], [0.0, 1.0]])

    losses = negative_log_likelihood(probabilities, np.array([0, 1, 1, 0]))

    # The last loss is that of float32's smallest normal number, 2 ** -126.
    assert losses.tolist() == pytest.approx([np.log(2), 0, np.log(10), 126 * np.log(2)])


def test_counts_have_positions_among_the_labels_and_others_are_refused() -> None:
    assert positions_of(np.array([5, 1, 6, 5]), [1, 5, AndMore(6)]).tolist() == [1, 0, 2, 1]
    with pytest.raises(UserError, match=r"knows the quantities \[1, 3\+\], not \[2, 4\]"):
        positions_of(np.array([4, 1, 2, 4]), [1, AndMore(3)])
