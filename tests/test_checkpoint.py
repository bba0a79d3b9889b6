"""Going on after a training was killed, to the same weights bit by bit."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.imaging.loader import Bins
from stages.networks.inference import place
from stages.runtime.errors import Stopped, UserError
from stages.training import checkpoint
from stages.training.checkpoint import (
    NotFiniteError,
    StopRequest,
    TrainingState,
    Watch,
    restore_checkpoint,
    save_checkpoint,
    stop_requests,
)
from stages.training.engine import Epoch, Trainer
from stages.training.processes import CPU, Processes
from tests.made import (
    equal,
    full_network,
    make_bins,
    model_knobs,
    one_torch_thread,
    tiny_classifier,
    weights_of,
)

LABELS = [1, 2, 3]
#: All that has a state, or draws something.
KNOBS = model_knobs(
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
    accumulation=2,
)
STEPS = 3
ALONE = Processes()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Bins:
    """Of three batches, the last one smaller."""
    return make_bins(tmp_path_factory.mktemp("bins"), [1, 2, 3, 1, 2, 3, 1, 2, 3, 1])


def new_trainer(bins: Bins, **changes: Any) -> Trainer:
    """As the train stage makes it, with weights in the memory format of its device."""
    classifier = tiny_classifier(LABELS, full_network)
    place(classifier, CPU)
    return Trainer(classifier, bins, bins, bins, KNOBS.model_copy(update=changes), 4)


def all_of(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of the weights, their average and the optimizer's state."""
    return {name: value.clone() for name, value in trainer.state.tensors().items()}


class KilledError(Exception):
    """What ends a training in these tests, without a word to it."""


def after_steps(trainer: Trainer, steps: int, action: Callable[[], None]) -> None:
    """Do something once the optimizer has taken so many steps."""
    taken = [0]

    def count(*_: Any) -> None:
        taken[0] += 1
        if taken[0] == steps:
            action()

    trainer.state.optimizer.register_step_post_hook(count)


def kill() -> None:
    raise KilledError


def run(trainer: Trainer, path: Path, request: StopRequest | None = None) -> list[Epoch]:
    """Train to the end, from the checkpoint if there is one, with one after each step."""
    restore_checkpoint(path, trainer.state, ALONE)
    return list(trainer.train(Watch(ALONE, path, 0, request or StopRequest())))


def run_until_stopped(trainer: Trainer, path: Path, steps: int) -> Stopped:
    request = StopRequest()

    def ask() -> None:
        request.signal = signal.SIGTERM

    after_steps(trainer, steps, ask)
    with pytest.raises(Stopped) as stopped:
        run(trainer, path, request)
    return stopped.value


@pytest.fixture(scope="module")
def undisturbed(bins: Bins) -> tuple[dict[str, Tensor], list[Epoch]]:
    """What comes out of a training without a checkpoint, let alone an end."""
    trainer = new_trainer(bins)
    epochs = list(trainer.train())
    return all_of(trainer), epochs


def assert_ends_as(
    trainer: Trainer, epochs: list[Epoch], undisturbed: tuple[dict[str, Tensor], list[Epoch]]
) -> None:
    weights, rows = undisturbed
    assert epochs == rows
    assert equal(all_of(trainer), weights)


@pytest.mark.parametrize("step", range(1, 2 * STEPS + 1))
def test_a_training_that_was_stopped_at_any_step_ends_the_same(
    step: int, bins: Bins, undisturbed: tuple[dict[str, Tensor], list[Epoch]], tmp_path: Path
) -> None:
    path = tmp_path / checkpoint.NAME
    stopped = run_until_stopped(new_trainer(bins), path, step)

    trainer = new_trainer(bins)
    epochs = run(trainer, path)

    epoch, place = divmod(step - 1, STEPS)
    assert (stopped.signal, stopped.where) == (
        signal.SIGTERM,
        f"at epoch {epoch + 1}, step {place + 1}",
    )
    assert_ends_as(trainer, epochs, undisturbed)


@pytest.mark.parametrize("step", range(1, 2 * STEPS + 1))
def test_a_training_that_was_killed_in_any_step_ends_the_same(
    step: int, bins: Bins, undisturbed: tuple[dict[str, Tensor], list[Epoch]], tmp_path: Path
) -> None:
    path = tmp_path / checkpoint.NAME
    first = new_trainer(bins)
    after_steps(first, step, kill)
    with pytest.raises(KilledError):
        run(first, path)
    # The step it was killed in is in no checkpoint, and the first one in none at all.
    assert path.exists() == (step > 1)

    trainer = new_trainer(bins)
    epochs = run(trainer, path)

    assert_ends_as(trainer, epochs, undisturbed)


def test_a_training_that_is_stopped_again_and_again_ends_the_same(
    bins: Bins, undisturbed: tuple[dict[str, Tensor], list[Epoch]], tmp_path: Path
) -> None:
    path = tmp_path / checkpoint.NAME
    for _ in range(2 * STEPS):
        run_until_stopped(new_trainer(bins), path, steps=1)

    trainer = new_trainer(bins)
    assert_ends_as(trainer, run(trainer, path), undisturbed)


def test_a_training_that_was_stopped_while_testing_repeats_only_the_test(
    bins: Bins, undisturbed: tuple[dict[str, Tensor], list[Epoch]], tmp_path: Path
) -> None:
    path = tmp_path / checkpoint.NAME
    request = StopRequest()
    first = new_trainer(bins)
    average = first.trained.network

    def ask(*_: Any) -> None:
        request.signal = signal.SIGINT

    # The average is only ever tested.
    average.register_forward_hook(ask)
    with pytest.raises(Stopped) as stopped:
        run(first, path, request)
    assert (stopped.value.signal, stopped.value.where) == (signal.SIGINT, "while testing epoch 1")

    trainer = new_trainer(bins)
    taken: list[int] = []
    trainer.state.optimizer.register_step_post_hook(lambda *_: taken.append(trainer.state.epoch))
    epochs = run(trainer, path)

    assert taken == [2] * STEPS
    assert_ends_as(trainer, epochs, undisturbed)


def test_without_an_average_too_it_ends_the_same(bins: Bins, tmp_path: Path) -> None:
    whole = new_trainer(bins, ema_decay=None, epochs=1)
    rows = list(whole.train())
    path = tmp_path / checkpoint.NAME
    run_until_stopped(new_trainer(bins, ema_decay=None, epochs=1), path, steps=2)

    trainer = new_trainer(bins, ema_decay=None, epochs=1)

    assert_ends_as(trainer, run(trainer, path), (all_of(whole), rows))


def test_a_frozen_backbone_too_ends_the_same(bins: Bins, tmp_path: Path) -> None:
    whole = new_trainer(bins, freeze_backbone=True, epochs=1)
    rows = list(whole.train())
    path = tmp_path / checkpoint.NAME
    run_until_stopped(new_trainer(bins, freeze_backbone=True, epochs=1), path, steps=2)

    trainer = new_trainer(bins, freeze_backbone=True, epochs=1)

    assert_ends_as(trainer, run(trainer, path), (all_of(whole), rows))
    assert not any(name.startswith("optimizer.0.") for name in all_of(trainer))


def trained_a_little(bins: Bins) -> Trainer:
    trainer = new_trainer(bins, epochs=1)
    list(trainer.train())
    return trainer


def test_all_tensors_come_back_in_their_own_memory_format(bins: Bins, tmp_path: Path) -> None:
    path = tmp_path / checkpoint.NAME
    before = trained_a_little(bins)
    save_checkpoint(path, before.state, (1.5, 2.0))

    after = new_trainer(bins, epochs=1)
    formats = {name: value.stride() for name, value in after.state.tensors().items()}
    assert restore_checkpoint(path, after.state, ALONE)

    restored = after.state.tensors()
    assert equal(restored, before.state.tensors())
    assert {name: value.stride() for name, value in restored.items()} == formats
    for name in ("network.0.weight", "average.module.0.weight", "optimizer.0.weight.exp_avg_sq"):
        assert restored[name].abs().sum() > 0
        assert restored[name].is_contiguous(memory_format=torch.channels_last)
        assert not restored[name].is_contiguous()
    # They are the network's own, not copies.
    weights = weights_of(before.classifier.network)
    assert equal(weights_of(after.classifier.network), weights)


def test_the_place_and_the_totals_come_back(bins: Bins, tmp_path: Path) -> None:
    path = tmp_path / checkpoint.NAME
    before = new_trainer(bins)
    before.state.epoch, before.state.step = 2, 1
    before.state.history[0] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    save_checkpoint(path, before.state, (1.5, 2.0))

    after = new_trainer(bins)
    restore_checkpoint(path, after.state, ALONE)

    assert (after.state.epoch, after.state.step) == (2, 1)
    assert after.state.totals.tolist() == [1.5, 2.0, math.inf]
    assert torch.equal(after.state.history, before.state.history)


def test_only_the_first_process_has_the_totals_of_all(bins: Bins, tmp_path: Path) -> None:
    path = tmp_path / checkpoint.NAME
    save_checkpoint(path, new_trainer(bins).state, (1.5, 2.0))
    place = load_file(path)["place"]

    @dataclass(frozen=True)
    class Second(Processes):
        """Gets the first one's place, and keeps its own tensors."""

        def broadcast(self, values: Tensor) -> None:
            if values.shape == place.shape and values.dtype == place.dtype:
                values.copy_(place)

    state = new_trainer(bins).state
    assert restore_checkpoint(path, state, Second(1, 2))
    assert state.totals.tolist() == [0, 0, math.inf]


@pytest.mark.parametrize("name", ["0.weight", "1.running_var", "5.bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_leave_the_checkpoint_of_before(
    name: str, value: float, bins: Bins, tmp_path: Path
) -> None:
    path = tmp_path / checkpoint.NAME
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
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("length", [0, 4, 100, 1000, -1])
def test_a_damaged_checkpoint_is_named_and_not_used(
    length: int, bins: Bins, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / checkpoint.NAME
    save_checkpoint(path, trained_a_little(bins).state, (1, 1))
    size = path.stat().st_size
    os.truncate(path, length if length >= 0 else size + length)
    trainer = new_trainer(bins)
    start = all_of(trainer)

    assert not restore_checkpoint(path, trainer.state, ALONE)

    assert equal(all_of(trainer), start)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path} cannot be read (")
    assert line.endswith("): starting from the beginning")


def test_without_a_checkpoint_a_training_starts_without_a_word(
    bins: Bins, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = new_trainer(bins).state

    assert not restore_checkpoint(tmp_path / checkpoint.NAME, state, ALONE)

    assert (state.epoch, state.step) == (1, 0)
    assert capsys.readouterr().out == ""


@pytest.fixture
def terminations() -> Iterator[list[int]]:
    """The SIGTERMs that come through to the handler of this process."""
    received: list[int] = []

    def keep(number: int, _: FrameType | None) -> None:
        received.append(number)

    before = signal.signal(signal.SIGTERM, keep)
    yield received
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_only_asks(number: int, terminations: list[int]) -> None:
    with stop_requests() as request:
        assert request.signal == 0
        signal.raise_signal(number)
        assert request.signal == number

    assert terminations == []


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C is not ignored, as it is in what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_is_obeyed_at_once(terminations: list[int]) -> None:
    with stop_requests():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert terminations == [signal.SIGTERM]
    with stop_requests():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("asked", [False, True])
def test_the_handlers_of_before_come_back(asked: bool, terminations: list[int]) -> None:
    handlers = [signal.getsignal(number) for number in checkpoint.STOP_SIGNALS]

    with suppress(KilledError), stop_requests():
        if asked:
            signal.raise_signal(signal.SIGTERM)
        raise KilledError

    assert [signal.getsignal(number) for number in checkpoint.STOP_SIGNALS] == handlers
    signal.raise_signal(signal.SIGTERM)
    assert terminations == [signal.SIGTERM]


@dataclass
class Clock:
    """A clock that goes on only when it is told to."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@dataclass(frozen=True)
class Group(Processes):
    """Stands for processes of which the others give those rows; notes every exchange."""

    others: list[list[float]] = field(default_factory=list)
    exchanged: list[list[float]] = field(default_factory=list)

    def gather(self, values: Tensor) -> Tensor:
        self.exchanged.append(values.tolist())
        return torch.stack([values, *map(values.new_tensor, self.others)])


def bare_state() -> TrainingState:
    network = full_network(3)
    totals = torch.tensor([0, 0, math.inf], dtype=torch.float64)
    history = torch.zeros(1, 4, dtype=torch.float64)
    return TrainingState(network, torch.optim.Adam(network.parameters()), None, totals, history)


def watch_of(processes: Processes, path: Path | None = None, seconds: float = math.inf) -> Watch:
    """Made when the clock stands at 0."""
    return Watch(processes, path, seconds, _looked=0.0, _saved=0.0)


def looks(seconds_of_steps: list[float], clock: Clock, watch: Watch, group: Group) -> list[int]:
    """After which of the steps, that take so long, the watch looks."""
    state, found = bare_state(), []
    for step, seconds in enumerate(seconds_of_steps, start=1):
        clock.now += seconds
        before = len(group.exchanged)
        watch.after_step(state, step)
        if len(group.exchanged) > before:
            found.append(step)
    return found


def test_slow_steps_are_looked_at_one_by_one(clock: Clock) -> None:
    group = Group()

    assert looks([5.0] * 6, clock, watch_of(group), group) == [1, 2, 3, 4, 5, 6]


def test_fast_steps_are_looked_at_about_once_a_second(clock: Clock) -> None:
    group = Group()

    found = looks([1 / 128] * 1000, clock, watch_of(group), group)

    # Twice as many steps each time, until they take a second.
    assert found == [1, 3, 7, 15, 31, 63, 127, 255, 383, 511, 639, 767, 895]


def test_a_slow_first_step_is_soon_forgotten(clock: Clock) -> None:
    group = Group()

    found = looks([30.0] + [1 / 128] * 299, clock, watch_of(group), group)

    assert found == [1, 2, 4, 8, 16, 32, 64, 128, 256]


def test_steps_that_become_slow_are_looked_at_more_often_again(clock: Clock) -> None:
    group = Group()

    found = looks([1 / 16] * 31 + [2.0] * 20, clock, watch_of(group), group)

    assert found[:5] == [1, 3, 7, 15, 31]
    assert found[5:] == [47, 48, 49, 50, 51]


def test_checkpoints_each_few_seconds_are_looked_for_as_often(clock: Clock) -> None:
    group = Group()

    found = looks([1 / 16] * 40, clock, watch_of(group, seconds=0.25), group)

    assert found[-4:] == [27, 31, 35, 39]


def test_a_checkpoint_is_written_when_its_time_has_come(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / checkpoint.NAME
    watch, state, written = watch_of(ALONE, path, seconds=10), bare_state(), []
    for step in range(1, 41):
        clock.now += 3
        state.step = step
        watch.after_step(state, step)
        if path.exists():
            written.append(step)
            path.unlink()

    assert written == [4, 8, 12, 16, 20, 24, 28, 32, 36, 40]


def test_without_a_path_nothing_is_written(clock: Clock, tmp_path: Path) -> None:
    watch = watch_of(ALONE, seconds=0)
    clock.now += 1

    watch.look(bare_state(), 4, save=True)

    assert list(tmp_path.iterdir()) == []


def row_of(
    loss: float = 0,
    right: float = 0,
    first_bad: float = math.inf,
    asked: float = 0,
    due: float = 0,
    steps: float = 1,
) -> list[float]:
    """What another process gives at a look."""
    return [loss, right, first_bad, asked, due, steps]


@pytest.mark.usefixtures("clock")
def test_a_look_adds_up_what_all_processes_saw() -> None:
    watch, state = watch_of(Group(0, 2, others=[row_of(loss=3.5, right=2)])), bare_state()
    state.totals[:2] = torch.tensor([1.5, 4.0])

    assert watch.look(state, images=10) == (5.0, 6.0)
    assert watch.mean_loss == 0.5


@pytest.mark.usefixtures("clock")
def test_a_process_stops_and_saves_when_another_was_asked_to(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.NAME
    watch, state = watch_of(Group(0, 2, others=[row_of(asked=signal.SIGTERM)]), path), bare_state()
    state.step = 7

    with pytest.raises(Stopped) as stopped:
        watch.look(state, 10)

    assert stopped.value.signal == signal.SIGTERM
    assert load_file(path)["place"].tolist() == [1, 7, 0, 0]


@pytest.mark.usefixtures("clock")
def test_only_the_first_process_writes_and_decides_when(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.NAME
    state = bare_state()

    # Here the row that comes first is this process's own, so it stands for the first one's.
    watch_of(Group(1, 2, others=[row_of(due=1)]), path).look(state, 4, save=True)
    watch_of(Group(0, 2, others=[row_of(due=1)]), path).look(state, 4)
    assert not path.exists()

    watch_of(Group(0, 2, others=[row_of()]), path).look(state, 4, save=True)
    assert path.exists()


@pytest.mark.usefixtures("clock")
def test_the_first_loss_of_any_process_that_was_not_finite_is_found_and_nothing_saved(
    tmp_path: Path,
) -> None:
    path = tmp_path / checkpoint.NAME
    group = Group(0, 3, others=[row_of(first_bad=5), row_of(first_bad=3)])

    with pytest.raises(NotFiniteError) as error:
        watch_of(group, path).look(bare_state(), 4, save=True)

    assert error.value.step == 3
    assert not path.exists()
