"""The optimizer and its learning rate, compared with transformers."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stages.networks.classifier import Classifier
from stages.runtime.params import ModelParams
from stages.training.optimization import learning_rate, make_optimizer, set_learning_rate
from tests.builders import model_params

KNOBS = model_params("resnet34", learning_rate=0.3, weight_decay=0.5)
SCHEDULERS: dict[str, Callable[[Optimizer, int, int], LRScheduler]] = {
    "constant": lambda optimizer, warmup_steps, _: transformers.get_constant_schedule_with_warmup(
        optimizer, warmup_steps
    ),
    "linear": transformers.get_linear_schedule_with_warmup,
    "cosine": transformers.get_cosine_schedule_with_warmup,
}


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize(("warmup_steps", "steps"), [(0, 5), (3, 10), (10, 10), (20, 10)])
def test_the_schedules_are_those_of_transformers(
    schedule: str, warmup_steps: int, steps: int
) -> None:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = SCHEDULERS[schedule](optimizer, warmup_steps, steps)
    expected = []
    for _ in range(steps):
        expected.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()

    settings = KNOBS.model_copy(update={"schedule": schedule, "warmup_steps": warmup_steps})
    rates = [learning_rate(settings, step, steps) for step in range(steps)]

    assert rates == pytest.approx(expected, abs=1e-12)


def small_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))


def optimizer_of(network: nn.Module, params: ModelParams) -> Optimizer:
    labels, size = [1, 2], 4
    return make_optimizer(Classifier(network, labels, size, [0.5] * 3, [0.5] * 3), params)


def decays(optimizer: Optimizer, network: nn.Module) -> dict[str, float]:
    """The weight decay of each trained parameter."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    return {
        names[parameter]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize(("name", "kind"), [("adam", Adam), ("adamw", AdamW)])
def test_weights_decay_and_biases_and_normalizations_do_not(name: str, kind: type) -> None:
    network = small_network()

    optimizer = optimizer_of(network, KNOBS.model_copy(update={"optimizer": name}))

    assert type(optimizer) is kind
    assert decays(optimizer, network) == {
        "0.weight": 0.5,
        "0.bias": 0,
        "1.weight": 0,
        "1.bias": 0,
        "3.weight": 0.5,
        "3.bias": 0,
    }


def test_frozen_parameters_are_not_optimized() -> None:
    network = small_network()
    network[0].requires_grad_(requires_grad=False)

    assert decays(optimizer_of(network, KNOBS), network).keys() == {
        "1.weight",
        "1.bias",
        "3.weight",
        "3.bias",
    }


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_a_new_learning_rate_applies_to_the_next_step(rate: float) -> None:
    network = nn.Linear(3, 2, bias=False)
    before = network.weight.detach().clone()
    optimizer = optimizer_of(network, KNOBS.model_copy(update={"weight_decay": 0.0}))
    network.weight.grad = torch.ones_like(network.weight)

    set_learning_rate(optimizer, rate)
    optimizer.step()

    # Adam's first step is as long as the learning rate.
    torch.testing.assert_close(network.weight, before - rate)
