"""The losses, against plain loops and torch's own."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stages.training.losses import ordinal_loss, training_loss

TARGETS = torch.tensor([0, 4, 2, 2, 1, 3])


def some_logits() -> Tensor:
    return 3 * torch.randn(len(TARGETS), 5, generator=torch.Generator().manual_seed(0))


def sure_of(label: int) -> Tensor:
    """Logits that leave no probability to another label."""
    logits = torch.full((1, 5), -100.0)
    logits[0, label] = 100.0
    return logits


def plain_ordinal_loss(logits: list[float], target: int, label_smoothing: float) -> float:
    """The squared differences of the two cumulative distributions, label by label."""
    powers = [math.exp(logit) for logit in logits]
    loss = predicted = wanted = 0.0
    for label, power in enumerate(powers):
        predicted += power / sum(powers)
        wanted += label_smoothing / len(logits)
        if label == target:
            wanted += 1 - label_smoothing
        loss += (predicted - wanted) ** 2
    return loss


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
def test_the_ordinal_loss_is_a_plain_loop_over_labels(label_smoothing: float) -> None:
    logits = some_logits()

    losses = training_loss("ordinal", logits, TARGETS, label_smoothing)

    expected = [
        plain_ordinal_loss(row, target, label_smoothing)
        for row, target in zip(logits.tolist(), TARGETS.tolist(), strict=True)
    ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_mistake_costs_more_the_farther_it_is_off() -> None:
    losses = [ordinal_loss(sure_of(label), torch.tensor([1])).item() for label in range(5)]

    # One for each label that the mass has to go along.
    assert losses == pytest.approx([1, 0, 1, 2, 3])


def test_cross_entropy_is_blind_to_how_far_a_mistake_is_off() -> None:
    target = torch.tensor([0])
    near, far = (
        training_loss("cross_entropy", sure_of(label), target, 0).item() for label in (1, 4)
    )

    assert near == far > 0


def test_smoothing_makes_being_sure_cost_something() -> None:
    target = torch.tensor([2])

    assert ordinal_loss(sure_of(2), target).item() == pytest.approx(0)
    assert ordinal_loss(sure_of(2), target, 0.1).item() > 0.001


def test_the_ordinal_loss_can_be_learned_from() -> None:
    logits = some_logits().requires_grad_()
    before = ordinal_loss(logits, TARGETS)
    before.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None

    after = ordinal_loss(logits.detach() - 0.1 * logits.grad, TARGETS)

    assert (after < before).all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs_for_each_image(label_smoothing: float) -> None:
    logits = some_logits()

    losses = training_loss("cross_entropy", logits, TARGETS, label_smoothing)

    assert losses.shape == (len(TARGETS),)
    mean = cross_entropy(logits, TARGETS, label_smoothing=label_smoothing)
    torch.testing.assert_close(losses.mean(), mean)
    first = cross_entropy(logits[:1], TARGETS[:1], label_smoothing=label_smoothing)
    torch.testing.assert_close(losses[0], first)


@pytest.mark.parametrize("name", ["cross_entropy", "ordinal"])
def test_an_empty_share_of_a_batch_has_no_losses(name: str) -> None:
    losses = training_loss(name, torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 0.1)

    assert losses.shape == (0,)
    assert losses.sum() == 0
