"""Resuming a killed training, which must end with the same weights, bit by bit."""

import errno
import io
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.imaging.loader import CPU, Bins
from stages.networks.inference import place
from stages.runtime.errors import Stopped, UserError
from stages.training import checkpoint
from stages.training.checkpoint import (
    StopRequest,
    TrainingState,
    Watch,
    restore_checkpoint,
    save_checkpoint,
    stop_requests,
)
from stages.training.engine import Epoch, Trainer
from stages.training.processes import Processes
from tests.builders import full_network, make_bins, model_params, one_torch_thread, tiny_classifier

LABELS = [1, 2, 3]
#: Params that turn on everything that has a state or uses random numbers.
KNOBS = model_params(
    "resnet34",
    epochs=2,
    batch_size=4,
    learning_rate=0.01,
    schedule="linear",
    warmup_steps=1,
    weight_decay=0.1,
    ema_decay=0.7,
    clip_norm=1.0,
    color_jitter=0.1,
    rotation=5.0,
    shift=0.05,
    blur=1.0,
    side_by_side=0.5,
    accumulation=2,
    keep="best",
)
STEPS = 3
EVERY_STEP = range(1, 2 * STEPS + 1)
ALONE = Processes()
#: The state at the end, and the rows of the epochs.
Outcome = tuple[dict[str, Any], list[Epoch]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Bins:
    """Bins for three batches, the last of which is smaller."""
    return make_bins(tmp_path_factory.mktemp("bins"), [1, 2, 3, 1, 2, 3, 1, 2, 3, 1])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / checkpoint.NAME


def new_trainer(bins: Bins, **changes: Any) -> Trainer:
    """A trainer like that of the train stage, with weights in the memory format of its device.

    The quantities of validation are wrong, so that learning makes it worse.
    """
    classifier = tiny_classifier(LABELS, full_network)
    place(classifier, CPU)
    validation_bins = replace(bins, quantities=(bins.quantities + 1) % 3 + 1)
    return Trainer(classifier, bins, validation_bins, KNOBS.model_copy(update=changes), 4)


def state_of(trainer: Trainer) -> dict[str, Any]:
    """The content of a checkpoint, with the format and bytes of tensors to compare."""
    return dict(leaves("", trainer.state.state_dict()))


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        yield name, (value.dtype, value.stride(), value.numpy().tobytes())
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(f"{name}.{key}", one)
    elif isinstance(value, list):
        yield from leaves(name, dict(enumerate(value)))
    else:
        yield name, value


class KilledError(Exception):
    """Ends a training without warning."""


def after_steps(trainer: Trainer, steps: int, action: Callable[[], None]) -> None:
    """Call `action` after this number of steps of the optimizer."""
    taken = [0]

    def count(*_: Any) -> None:
        taken[0] += 1
        if taken[0] == steps:
            action()

    trainer.state.optimizer.register_step_post_hook(count)


def run(trainer: Trainer, path: Path, request: StopRequest | None = None) -> Outcome:
    """Train to the end, from a checkpoint if there is one, and write one after each step."""
    restore_checkpoint(path, trainer.state, ALONE)
    epochs = list(trainer.train(Watch(ALONE, path, 0, request or StopRequest())))
    return state_of(trainer), epochs


def stop(trainer: Trainer, path: Path, steps: int) -> Stopped:
    request = StopRequest()

    def ask() -> None:
        request.signal = signal.SIGTERM

    after_steps(trainer, steps, ask)
    with pytest.raises(Stopped) as stopped:
        run(trainer, path, request)
    return stopped.value


def kill(trainer: Trainer, path: Path, steps: int) -> None:
    """Kill the training in this step, so that the checkpoint has the steps before it."""

    def end() -> None:
        raise KilledError

    after_steps(trainer, steps, end)
    with pytest.raises(KilledError):
        run(trainer, path)


@pytest.fixture(scope="module")
def undisturbed(bins: Bins) -> Outcome:
    """The outcome of a training that was not interrupted and wrote no checkpoint."""
    trainer = new_trainer(bins)
    epochs = list(trainer.train())
    # So checkpoints of the second epoch must contain the weights of the first.
    assert trainer.kept_epoch == 1
    return state_of(trainer), epochs


@pytest.mark.parametrize("step", EVERY_STEP)
def test_a_training_that_was_stopped_at_any_step_ends_with_the_same_bytes(
    step: int, bins: Bins, undisturbed: Outcome, path: Path
) -> None:
    stopped = stop(new_trainer(bins), path, step)

    epoch, place = divmod(step - 1, STEPS)
    assert stopped.where == f"at epoch {epoch + 1}, step {place + 1}"
    assert run(new_trainer(bins), path) == undisturbed


@pytest.mark.parametrize("step", EVERY_STEP)
def test_a_training_that_was_killed_in_any_step_ends_with_the_same_bytes(
    step: int, bins: Bins, undisturbed: Outcome, path: Path
) -> None:
    kill(new_trainer(bins), path, step)

    assert path.exists() == (step > 1)
    assert run(new_trainer(bins), path) == undisturbed


def test_a_training_that_is_stopped_again_and_again_ends_with_the_same_bytes(
    bins: Bins, undisturbed: Outcome, path: Path
) -> None:
    for _ in EVERY_STEP:
        stop(new_trainer(bins), path, steps=1)

    assert run(new_trainer(bins), path) == undisturbed


@pytest.mark.parametrize(
    "changes", [{"ema_decay": None}, {"freeze_backbone": True}, {"keep": "last"}], ids=str
)
def test_without_an_average_with_a_frozen_backbone_or_keeping_the_last_epoch_too(
    changes: dict[str, Any], bins: Bins, path: Path
) -> None:
    whole = new_trainer(bins, epochs=1, **changes)
    rows = list(whole.train())
    stop(new_trainer(bins, epochs=1, **changes), path, steps=2)

    assert run(new_trainer(bins, epochs=1, **changes), path) == (state_of(whole), rows)


def test_a_training_that_was_stopped_while_validating_repeats_only_that(
    bins: Bins, undisturbed: Outcome, path: Path
) -> None:
    request, first = StopRequest(), new_trainer(bins)

    def ask(*_: Any) -> None:
        request.signal = signal.SIGINT

    # The average is used for validation only.
    first.trained.network.register_forward_hook(ask)
    with pytest.raises(Stopped) as stopped:
        run(first, path, request)
    assert stopped.value.signal == signal.SIGINT
    assert stopped.value.where == "while validating epoch 1"

    trainer = new_trainer(bins)
    taken: list[int] = []
    trainer.state.optimizer.register_step_post_hook(lambda *_: taken.append(trainer.state.epoch))

    assert run(trainer, path) == undisturbed
    assert taken == [2] * STEPS


@pytest.mark.parametrize("name", ["0.weight", "1.running_var", "5.bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_leave_the_checkpoint_of_before(
    name: str, value: float, bins: Bins, path: Path
) -> None:
    trainer = new_trainer(bins)
    save_checkpoint(path, trainer.state, (0, 0))
    good = path.read_bytes()
    trainer.state.step = 2
    weights: Tensor = trainer.classifier.network.state_dict()[name]
    weights[(-1,) * weights.ndim] = value

    with pytest.raises(
        UserError, match=f"^{name} is no longer finite at step 2 of epoch 1: lower .*learning_rate"
    ):
        save_checkpoint(path, trainer.state, (0, 0))

    assert path.read_bytes() == good
    assert list(path.parent.iterdir()) == [path]


def test_a_checkpoint_that_memory_has_no_room_for_is_not_called_damaged(
    bins: Bins, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = new_trainer(bins)
    save_checkpoint(path, trainer.state, (0, 0))

    def fail(*_: object, **__: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr("torch.load", fail)

    with pytest.raises(OSError, match="Cannot allocate memory") as caught:
        restore_checkpoint(path, trainer.state, ALONE)
    assert caught.value.errno == errno.ENOMEM


@pytest.mark.parametrize("length", [0, 4, 100, 1000, -1])
def test_a_torn_checkpoint_is_named_and_not_used(
    length: int, bins: Bins, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = new_trainer(bins, epochs=1)
    list(trained.train())
    save_checkpoint(path, trained.state, (1, 1))
    os.truncate(path, length if length >= 0 else path.stat().st_size + length)
    trainer = new_trainer(bins)
    start = state_of(trainer)

    assert not restore_checkpoint(path, trainer.state, ALONE)

    assert state_of(trainer) == start
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path} is damaged (")
    assert line.endswith("): starting from the beginning")


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_a_checkpoint_that_the_machine_cannot_read_ends_the_training(
    number: int, bins: Bins, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(path, new_trainer(bins).state, (0, 0))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(io, "open", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        restore_checkpoint(path, new_trainer(bins).state, ALONE)


def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing(
    bins: Bins, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to_a_full_disk(_: Path, data: bytes) -> None:
        with open("/dev/full", "wb", buffering=0) as device:  # noqa: PTH123
            device.write(data)

    monkeypatch.setattr(Path, "write_bytes", to_a_full_disk)
    with pytest.raises(OSError, match="No space left") as error:
        save_checkpoint(path, new_trainer(bins).state, (0, 0))

    assert error.value.errno == errno.ENOSPC
    assert list(path.parent.iterdir()) == []


def test_without_a_checkpoint_a_training_starts_without_a_word(
    bins: Bins, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = new_trainer(bins).state

    assert not restore_checkpoint(path, state, ALONE)

    assert (state.epoch, state.step) == (1, 0)
    assert capsys.readouterr().out == ""


@pytest.fixture
def terminations() -> Iterator[list[int]]:
    """The SIGTERMs that reach the handler of this process."""
    received: list[int] = []

    def keep(number: int, _: FrameType | None) -> None:
        received.append(number)

    before = signal.signal(signal.SIGTERM, keep)
    yield received
    signal.signal(signal.SIGTERM, before)


@dataclass
class Clock:
    """A clock that only the test moves."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_only_asks_also_where_it_comes_twice(
    number: int, terminations: list[int], clock: Clock
) -> None:
    with stop_requests() as request:
        assert request.signal == 0
        signal.raise_signal(number)
        # For example from a terminal, and again from torchrun.
        clock.now += 0.9
        signal.raise_signal(number)
        assert request.signal == number

    assert terminations == []


@pytest.mark.usefixtures("interruptible")
def test_a_later_signal_is_obeyed_at_once(terminations: list[int], clock: Clock) -> None:
    with stop_requests():
        signal.raise_signal(signal.SIGINT)
        clock.now += 1.1
        signal.raise_signal(signal.SIGTERM)
        assert terminations == [signal.SIGTERM]
    with stop_requests():
        signal.raise_signal(signal.SIGTERM)
        clock.now += 1.1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@dataclass(frozen=True)
class Noting(Processes):
    """Records every exchange."""

    exchanged: list[Tensor] = field(default_factory=list)

    def gather(self, values: Tensor) -> Tensor:
        self.exchanged.append(values)
        return super().gather(values)


def bare_state() -> TrainingState:
    network = full_network(3)
    totals = torch.tensor([0, 0, math.inf], dtype=torch.float64)
    history = torch.zeros(1, 4, dtype=torch.float64)
    return TrainingState(network, torch.optim.Adam(network.parameters()), None, totals, history)


def watch_of(processes: Processes, path: Path | None = None, seconds: float = math.inf) -> Watch:
    """A watch that starts when the clock is at 0."""
    return Watch(processes, path, seconds, _looked=0.0, _saved=0.0)


@pytest.mark.parametrize(
    ("seconds_of_steps", "seconds_between_checkpoints", "looks"),
    [
        ([5.0] * 6, math.inf, [1, 2, 3, 4, 5, 6]),
        # The number of steps doubles until they take a second.
        ([1 / 128] * 600, math.inf, [1, 3, 7, 15, 31, 63, 127, 255, 383, 511]),
        ([30.0] + [1 / 128] * 199, math.inf, [1, 2, 4, 8, 16, 32, 64, 128]),
        ([1 / 16] * 31 + [2.0] * 20, math.inf, [1, 3, 7, 15, 31, 47, 48, 49, 50, 51]),
        ([1 / 16] * 20, 0.25, [1, 3, 7, 11, 15, 19]),
    ],
    ids=["slow", "fast", "slow at first", "slow later", "frequent checkpoints"],
)
def test_steps_are_looked_at_about_once_a_second(
    seconds_of_steps: list[float],
    seconds_between_checkpoints: float,
    looks: list[int],
    clock: Clock,
) -> None:
    processes, state, found = Noting(), bare_state(), []
    watch = watch_of(processes, seconds=seconds_between_checkpoints)
    for step, seconds in enumerate(seconds_of_steps, start=1):
        clock.now += seconds
        before = len(processes.exchanged)
        watch.after_step(state, step)
        if len(processes.exchanged) > before:
            found.append(step)

    assert found == looks


def test_a_checkpoint_is_written_when_its_time_has_come(clock: Clock, path: Path) -> None:
    watch, state, written = watch_of(ALONE, path, seconds=10), bare_state(), []
    for step in range(1, 21):
        clock.now += 3
        state.step = step
        watch.after_step(state, step)
        if path.exists():
            written.append(step)
            path.unlink()

    assert written == [4, 8, 12, 16, 20]
