"""What a training needs to go on after it was killed, and when to write it."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from stages.runtime.errors import Stopped, UserError
from stages.runtime.files import atomic_write
from stages.training.processes import Processes

NAME = "checkpoint.safetensors"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Processes agree this often that all is well; on a GPU, reading the loss waits for its queue.
SECONDS_BETWEEN_LOOKS = 1.0


class NotFiniteError(Exception):
    """The loss of the step `step` of the epoch is not a number, or infinite."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


@dataclass
class TrainingState:
    """All that changes while a network is trained.

    `epoch` (from 1) is the one under way and `step` the number of its finished steps. `totals`
    float64 [3] on the device: of the steps of this process in this epoch, the sum of the losses of
    all images, how many it got right, and the first step whose loss was not finite, or infinity.
    `history` float64 [epochs, values]: the rows of the finished epochs.
    """

    network: nn.Module
    optimizer: Optimizer
    average: AveragedModel | None
    totals: Tensor
    history: Tensor
    epoch: int = 1
    step: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Those of the network, its average and the optimizer, by name, to read and to write."""
        found = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        if self.average is not None:
            state = self.average.state_dict()
            found |= {f"average.{name}": value for name, value in state.items()}
        for name, parameter in self.network.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            found |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
        return found | {"history": self.history}

    def start_epoch(self, epoch: int) -> None:
        self.epoch, self.step = epoch, 0
        self.totals.copy_(torch.tensor([0, 0, math.inf]))


def save_checkpoint(path: Path, state: TrainingState, totals: tuple[float, float]) -> None:
    """Write it whole or not at all. `totals`: the first two, of all processes together.

    Raises UserError, and leaves the checkpoint of before, where a weight is not finite.
    """
    place = torch.tensor([state.epoch, state.step, *totals], dtype=torch.float64)
    # Copies: safetensors takes contiguous tensors that share no memory.
    tensors = {
        name: value.to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in state.tensors().items()
    }
    for name, value in tensors.items():
        if name.startswith("network.") and not value.isfinite().all():
            raise UserError(
                f"{name.removeprefix('network.')} is no longer finite at step {state.step} of"
                f" epoch {state.epoch}: lower this model's learning_rate"
            )
    with atomic_write(path, sum(value.nbytes for value in tensors.values())) as temporary:
        save_file(tensors | {"place": place}, temporary)


def restore_checkpoint(path: Path, state: TrainingState, processes: Processes) -> bool:
    """Go on from the first process's checkpoint, in all of them. False where there is none."""
    place = torch.zeros(4, dtype=torch.float64)
    targets = state.tensors()
    if processes.is_first and (saved := _load(path)) is not None:
        place = saved["place"]
        for name, target in targets.items():
            target.copy_(saved[name])
    processes.broadcast(place)
    epoch, step, *totals = place.tolist()
    if not epoch:
        return False
    for target in targets.values():
        processes.broadcast(target)
    state.start_epoch(int(epoch))
    state.step = int(step)
    if processes.is_first:
        state.totals[:2] = torch.tensor(totals, dtype=torch.float64)
    return True


def _load(path: Path) -> dict[str, Tensor] | None:
    if not path.exists():
        return None
    try:
        return load_file(path)
    except SafetensorError as error:
        print(f"{path} cannot be read ({error}): starting from the beginning", flush=True)
        return None


@dataclass
class StopRequest:
    """The signal that asked this process to stop, if one did."""

    signal: int = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While the block runs, SIGTERM and Ctrl-C only ask. A second one is obeyed at once."""
    request = StopRequest()
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def ask(number: int, _frame: FrameType | None) -> None:
        request.signal = number
        for each, handler in handlers.items():
            signal.signal(each, handler)

    for number in STOP_SIGNALS:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@dataclass
class Watch:
    """Looks after a training now and then: finite losses, checkpoints, requests to stop.

    All processes look at the same steps, and then exchange one small vector. That is the only
    time at which a step waits for the device.
    """

    processes: Processes = field(default_factory=Processes)
    path: Path | None = None
    seconds_between_checkpoints: float = math.inf
    request: StopRequest = field(default_factory=StopRequest)
    mean_loss: float = math.nan
    _steps_to_look: int = 1
    _steps: int = 0
    _looked: float = field(default_factory=time.monotonic)
    _saved: float = field(default_factory=time.monotonic)

    def after_step(self, state: TrainingState, images: int) -> None:
        """`images`: how many of this epoch all processes have seen together."""
        self._steps += 1
        if self._steps >= self._steps_to_look:
            self.look(state, images)

    def look(self, state: TrainingState, images: int, *, save: bool = False) -> tuple[float, float]:
        """The sum of the losses of this epoch's images and how many were right, in all processes.

        Checked, and a checkpoint is written if one is due. Raises NotFiniteError, or Stopped once
        the checkpoint for it is written.
        """
        now = time.monotonic()
        due = save or now - self._saved > self.seconds_between_checkpoints
        own = [self.request.signal, due, self._steps_to_next_look(now)]
        vector = torch.cat([state.totals, state.totals.new_tensor(own)])
        rows = self.processes.gather(vector).tolist()
        losses, right, first_bad, signals, dues, steps = map(list, zip(*rows, strict=True))
        if math.isfinite(min(first_bad)):
            raise NotFiniteError(int(min(first_bad)))
        totals = sum(losses), sum(right)
        self.mean_loss = totals[0] / max(1, images)
        self._steps, self._steps_to_look, self._looked = 0, int(steps[0]), now
        if self.path is not None and (dues[0] or any(signals)):
            if self.processes.is_first:
                save_checkpoint(self.path, state, totals)
            self._saved = time.monotonic()
        if number := int(max(signals)):
            raise Stopped(number, f"at epoch {state.epoch}, step {state.step}")
        return totals

    def _steps_to_next_look(self, now: float) -> int:
        """At most twice as many as to this one: the first steps are slow."""
        seconds = min(SECONDS_BETWEEN_LOOKS, self.seconds_between_checkpoints)
        fitting = self._steps * seconds / max(1e-9, now - self._looked)
        return max(1, min(int(fitting), 2 * self._steps_to_look))

    def stop_if_asked(self, where: str) -> None:
        """Where a checkpoint has just been written, so that no process needs the others."""
        if self.request.signal:
            raise Stopped(self.request.signal, where)
