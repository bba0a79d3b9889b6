"""The optimizer and its learning rate, against torch's and transformers' own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stages.runtime.params import Model
from stages.training.optimization import learning_rate, make_optimizer, set_learning_rate
from tests.made import equal, model_knobs, weights_of

KNOBS = model_knobs("resnet34", learning_rate=0.3)


def knobs_with(**changes: Any) -> Model:
    return KNOBS.model_copy(update=changes)


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "factors"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1, 1]),
        ("constant", 2, [0, 1 / 2, 1, 1, 1, 1, 1]),
        ("linear", 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]),
        ("linear", 2, [0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4, 0]),
        ("linear", 8, [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8]),
        ("cosine", 0, [1, 0.9330127, 3 / 4, 1 / 2, 1 / 4, 0.0669873, 0]),
        ("cosine", 2, [0, 1 / 2, 1, 0.8535534, 1 / 2, 0.1464466, 0]),
        ("cosine", 6, [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1]),
    ],
)
def test_the_learning_rate_follows_its_table(
    schedule: str, warmup_steps: int, factors: list[float]
) -> None:
    knobs = knobs_with(schedule=schedule, warmup_steps=warmup_steps)

    rates = [learning_rate(knobs, step, 6) for step in range(7)]

    assert rates == pytest.approx([0.3 * factor for factor in factors])


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

    knobs = knobs_with(schedule=schedule, warmup_steps=warmup_steps)
    rates = [learning_rate(knobs, step, steps) for step in range(steps)]

    assert rates == pytest.approx(expected, abs=1e-12)


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))


def give_gradients(network: nn.Module, seed: int = 1) -> None:
    random = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random)


def decays(optimizer: Optimizer, network: nn.Module) -> dict[str, float]:
    """The weight decay of each parameter that is trained."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    return {
        names[parameter]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_weights_decay_and_biases_and_normalizations_do_not() -> None:
    network = small_network()

    optimizer = make_optimizer(network, knobs_with(weight_decay=0.5))

    assert decays(optimizer, network) == {
        "0.weight": 0.5,
        "0.bias": 0,
        "1.weight": 0,
        "1.bias": 0,
        "3.weight": 0.5,
        "3.bias": 0,
    }


def test_what_is_frozen_is_not_the_optimizers() -> None:
    network = small_network()
    network[0].requires_grad_(requires_grad=False)

    optimizer = make_optimizer(network, knobs_with(weight_decay=0.5))

    assert decays(optimizer, network).keys() == {"1.weight", "1.bias", "3.weight", "3.bias"}
    assert network[0].weight not in optimizer.state


@pytest.mark.parametrize(("name", "plain"), [("adam", Adam), ("adamw", AdamW)])
def test_steps_from_the_state_made_ahead_are_those_of_torch(name: str, plain: type[Adam]) -> None:
    network, other = small_network(), small_network()
    optimizer = make_optimizer(network, knobs_with(optimizer=name))
    reference = plain(other.parameters(), lr=0.3, weight_decay=0, fused=True)
    for step in range(3):
        for each, its_optimizer in ((network, optimizer), (other, reference)):
            give_gradients(each, seed=step)
            its_optimizer.step()

    assert equal(weights_of(network), weights_of(other))
    for parameter, twin in zip(network.parameters(), other.parameters(), strict=True):
        assert equal(optimizer.state[parameter], reference.state[twin])


def test_the_state_made_ahead_has_the_names_types_and_format_of_torchs() -> None:
    network = small_network().to(memory_format=torch.channels_last)
    ahead = make_optimizer(network, KNOBS).state

    plain = Adam(network.parameters(), fused=True)
    give_gradients(network)
    plain.step()

    def described(state: dict[str, Tensor]) -> dict[str, object]:
        return {
            name: (value.dtype, value.device, value.shape, value.stride())
            for name, value in state.items()
        }

    assert ahead.keys() == plain.state.keys()
    for parameter, state in plain.state.items():
        assert described(ahead[parameter]) == described(state)


def test_a_learning_rate_that_is_set_is_that_of_the_next_step() -> None:
    network = small_network()
    before = weights_of(network)
    optimizer = make_optimizer(network, knobs_with(weight_decay=0.5))
    give_gradients(network)

    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    assert equal(weights_of(network), before)

    set_learning_rate(optimizer, 0.01)
    optimizer.step()
    # Adam's steps are about as long as the learning rate, in the direction against the gradient.
    moved = weights_of(network)["3.bias"] - before["3.bias"]
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.01), rtol=0.1, atol=0)
