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
def test_a_share_of_1_is_a_plain_loop_over_labels(label_smoothing: float) -> None:
    logits = some_logits()

    losses = training_loss(logits, TARGETS, label_smoothing, 1.0)

    expected = [
        plain_ordinal_loss(row, target, label_smoothing)
        for row, target in zip(logits.tolist(), TARGETS.tolist(), strict=True)
    ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_share_of_0_is_torchs_cross_entropy(label_smoothing: float) -> None:
    logits = some_logits()

    losses = training_loss(logits, TARGETS, label_smoothing, 0.0)

    for loss, row, target in zip(losses, logits, TARGETS, strict=True):
        expected = cross_entropy(row, target, label_smoothing=label_smoothing)
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_a_share_between_weighs_the_two(share: float) -> None:
    logits = some_logits()
    entropies, distances = (training_loss(logits, TARGETS, 0.1, pure) for pure in (0.0, 1.0))

    losses = training_loss(logits, TARGETS, 0.1, share)

    torch.testing.assert_close(losses, (1 - share) * entropies + share * distances)


@pytest.mark.parametrize(("share", "costs"), [(1.0, [1, 0, 1, 2, 3]), (0.0, [200, 0, *[200] * 3])])
def test_only_the_ordinal_loss_depends_on_the_size_of_a_mistake(
    share: float, costs: list[float]
) -> None:
    losses = [
        training_loss(sure_of(label), torch.tensor([1]), 0.0, share).item() for label in range(5)
    ]

    assert losses == pytest.approx(costs)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_an_empty_share_of_a_batch_has_no_losses(share: float) -> None:
    losses = training_loss(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 0.1, share)

    assert losses.shape == (0,)
    assert losses.sum() == 0
