"""Temperature scaling, against SciPy's softmax and minimizers and by hand."""

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
    with_temperature,
)

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


def drawn_logits(seed: int, bins: int = 400, spread: float = 2.0) -> Floats:
    """[bins, labels], with a constant of its own for each bin, which a softmax does not see."""
    chance = np.random.default_rng(seed)
    return chance.normal(0, spread, (bins, 5)) + chance.normal(0, 10, (bins, 1))


def drawn_targets(probabilities: Floats, seed: int) -> Counts:
    """A label for each row, as often as its probability says."""
    chance = np.random.default_rng([seed, 1]).random((len(probabilities), 1))
    places = (probabilities.cumsum(axis=1) < chance).sum(axis=1)
    targets: Counts = places.clip(max=probabilities.shape[1] - 1)
    return targets


def loss_of(logits: Floats, targets: Counts, temperature: float) -> float:
    """Cross-entropy as SciPy has it."""
    logs = log_softmax(logits / temperature, axis=1)
    return float(-logs[np.arange(len(targets)), targets].mean())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_fitted_temperature_is_that_of_scipys_minimizer_on_logits(
    true: float, seed: int
) -> None:
    logits = drawn_logits(seed)
    targets = drawn_targets(softmax(logits / true, axis=1), seed)

    fitted = fit_temperature(softmax(logits, axis=1), targets)

    def loss(parameters: Floats) -> float:
        return loss_of(logits, targets, float(np.exp(parameters[0])))

    found = minimize(loss, [0.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12})
    assert fitted == pytest.approx(float(np.exp(found.x[0])), rel=1e-3)


@pytest.mark.parametrize("spread", [0.3, 2.0, 10.0])
def test_no_temperature_of_a_grid_has_a_lower_loss(spread: float) -> None:
    logits = drawn_logits(0, spread=spread)
    targets = drawn_targets(softmax(drawn_logits(0, spread=1.0), axis=1), 0)

    fitted = fit_temperature(softmax(logits, axis=1), targets)

    losses = [loss_of(logits, targets, t) for t in np.geomspace(LOWEST, HIGHEST, 300)]
    assert loss_of(logits, targets, fitted) <= min(losses) + 1e-6


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_found_again(true: float) -> None:
    logits = drawn_logits(7, bins=20_000)
    targets = drawn_targets(softmax(logits / true, axis=1), 7)

    fitted = fit_temperature(softmax(logits, axis=1).astype(np.float32), targets)

    assert fitted == pytest.approx(true, rel=0.04)


def test_probabilities_that_are_calibrated_already_stay() -> None:
    probabilities = softmax(drawn_logits(1), axis=1)
    targets = drawn_targets(softmax(drawn_logits(1) / 2, axis=1), 1)

    calibrated = with_temperature(probabilities, fit_temperature(probabilities, targets))

    assert fit_temperature(calibrated, targets) == pytest.approx(1, abs=1e-3)
    before, after = (
        negative_log_likelihood(some, targets).mean() for some in (probabilities, calibrated)
    )
    assert after < before - 0.01


@pytest.mark.parametrize("temperature", [0.2, 1.0, 1.7, 9.0])
def test_a_temperature_divides_the_logits(temperature: float) -> None:
    logits = drawn_logits(2)

    calibrated = with_temperature(softmax(logits, axis=1), temperature)

    np.testing.assert_allclose(calibrated, softmax(logits / temperature, axis=1), atol=1e-12)


def test_a_temperature_worked_by_hand() -> None:
    # Half the logits are the roots of the probabilities, up to their sum.
    calibrated = with_temperature(np.array([[0.64, 0.32, 0.04]]), 2.0)

    roots = np.array([0.8, 0.32**0.5, 0.2])
    np.testing.assert_allclose(calibrated, [roots / roots.sum()])


def test_the_order_of_the_labels_stays_and_confidence_falls_with_the_temperature() -> None:
    probabilities = softmax(drawn_logits(3), axis=1)

    rows = [with_temperature(probabilities, temperature) for temperature in (0.5, 1, 2, 4)]

    for row in rows:
        np.testing.assert_array_equal(row.argsort(axis=1), probabilities.argsort(axis=1))
    confidences = np.array([row.max(axis=1) for row in rows])
    assert (np.diff(confidences, axis=0) < 0).all()


def test_probabilities_of_0_are_calibrated_too() -> None:
    # A float32 softmax of logits this far apart has zeros, also for some of the targets.
    logits = np.float32(drawn_logits(4, spread=80.0))
    probabilities = softmax(logits, axis=1)
    targets = drawn_targets(softmax(drawn_logits(4, spread=1.0), axis=1), 4)
    assert (probabilities[np.arange(len(targets)), targets] == 0).any()

    temperature = fit_temperature(probabilities, targets)
    calibrated = with_temperature(probabilities, temperature)

    assert 10 < temperature <= HIGHEST
    # A temperature this high leaves none of them impossible.
    assert (calibrated > 1e-9).all()
    np.testing.assert_allclose(calibrated.sum(axis=1), 1, rtol=1e-12)
    assert np.isfinite(negative_log_likelihood(probabilities, targets)).all()


@pytest.mark.parametrize("temperature", [LOWEST, HIGHEST])
def test_the_ends_of_the_range_give_probabilities(temperature: float) -> None:
    probabilities = np.array([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [1 / 3, 1 / 3, 1 / 3]])

    calibrated = with_temperature(probabilities, temperature)

    assert np.isfinite(calibrated).all()
    np.testing.assert_allclose(calibrated.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(calibrated[2], 1 / 3)


def test_what_is_always_right_or_always_wrong_ends_at_an_end_of_the_range() -> None:
    probabilities = np.array([[0.6, 0.4], [0.3, 0.7]])

    assert fit_temperature(probabilities, np.array([0, 1])) == pytest.approx(LOWEST, rel=1e-3)
    assert fit_temperature(probabilities, np.array([1, 0])) == pytest.approx(HIGHEST, rel=1e-3)


def test_a_likelihood_worked_by_hand() -> None:
    probabilities = np.array([[0.5, 0.5], [0.0, 1.0], [0.9, 0.1], [0.0, 1.0]])

    losses = negative_log_likelihood(probabilities, np.array([0, 1, 1, 0]))

    # The last one is that of float32's least normal number, 2 ** -126.
    assert losses.tolist() == pytest.approx([np.log(2), 0, np.log(10), 126 * np.log(2)])
