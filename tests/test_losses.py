"""The losses, compared with plain loops and with torch's own."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stages.training.losses import training_loss

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


@pytest.mark.parametrize(
    ("name", "costs"), [("ordinal", [1, 0, 1, 2, 3]), ("cross_entropy", [200, 0, 200, 200, 200])]
)
def test_only_the_ordinal_loss_depends_on_the_size_of_a_mistake(
    name: str, costs: list[float]
) -> None:
    losses = [
        training_loss(name, sure_of(label), torch.tensor([1]), 0.0).item() for label in range(5)
    ]

    assert losses == pytest.approx(costs)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs_for_each_image(label_smoothing: float) -> None:
    logits = some_logits()

    losses = training_loss("cross_entropy", logits, TARGETS, label_smoothing)

    for loss, row, target in zip(losses, logits, TARGETS, strict=True):
        expected = cross_entropy(row, target, label_smoothing=label_smoothing)
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", ["cross_entropy", "ordinal"])
def test_an_empty_share_of_a_batch_has_no_losses(name: str) -> None:
    losses = training_loss(name, torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 0.1)

    assert losses.shape == (0,)
    assert losses.sum() == 0
