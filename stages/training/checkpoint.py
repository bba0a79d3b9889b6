"""Checkpoints: what they contain, when they are written, and how a training resumes from one."""

import io
import math
import pickle
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from stages.runtime.errors import Stopped, UserError
from stages.runtime.files import atomic_write
from stages.runtime.machine import machine_error
from stages.training.processes import Processes

NAME = "checkpoint.pt"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# How often the processes check on each other. On a GPU, reading the loss waits for queued work.
SECONDS_BETWEEN_LOOKS = 1.0
# A process may get one request several times: from a terminal, a scheduler and torchrun.
SECONDS_OF_ONE_REQUEST = 1.0


class NotFiniteError(Exception):
    """The loss is infinite or not a number at this step of the epoch, counted from 0."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


@dataclass
class TrainingState:
    """Everything that changes while a network is trained.

    `epoch` is the current epoch, counted from 1, and `step` the number of its finished steps.
    `totals`, float64 [3] on the device, describes this process's steps of the epoch: the sum of the
    losses of all images, the number of correct predictions, and the first step whose loss was not
    finite, or infinity. `history`, float64 [epochs, values], has the rows of the finished epochs.
    `best` has the weights of the best finished epoch, on the CPU, if that epoch is to be kept.
    """

    network: nn.Module
    optimizer: Optimizer
    average: AveragedModel | None
    totals: Tensor
    history: Tensor
    epoch: int = 1
    step: int = 0
    best: dict[str, Tensor] | None = None

    def start_epoch(self, epoch: int) -> None:
        self.epoch, self.step = epoch, 0
        self.totals.copy_(torch.tensor([0, 0, math.inf]))

    def state_dict(self) -> dict[str, Any]:
        """Everything except the totals, which differ between processes."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "history": self.history,
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        self.history.copy_(saved["history"])
        self.start_epoch(saved["epoch"])
        self.step = saved["step"]
        self.best = saved["best"]


def save_checkpoint(path: Path, state: TrainingState, totals: tuple[float, float]) -> None:
    """Write the checkpoint whole or not at all.

    `totals` are the first two of the state's totals, summed over all processes. Raises UserError,
    and leaves an earlier checkpoint as it is, if a weight is not finite.
    """
    for name, value in state.network.state_dict().items():
        if not value.isfinite().all():
            raise UserError(
                f"{name} is no longer finite at step {state.step} of epoch {state.epoch}: lower"
                " this model's learning_rate"
            )
    # Through memory, because torch's error on a full disk does not mention the disk.
    buffer = io.BytesIO()
    torch.save(state.state_dict() | {"totals": totals}, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def restore_checkpoint(path: Path, state: TrainingState, processes: Processes) -> bool:
    """Load the first process's checkpoint into all processes. False if there is none to load."""
    data = path.read_bytes() if processes.is_first and path.exists() else None
    saved = _load(path, processes.agree(data))
    if saved is None:
        return False
    state.load_state_dict(saved)
    if processes.is_first:
        state.totals[:2] = torch.tensor(saved["totals"], dtype=torch.float64)
    return True


def _load(path: Path, data: bytes | None) -> dict[str, Any] | None:
    if data is None:
        return None
    try:
        saved: dict[str, Any] = torch.load(io.BytesIO(data), "cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, LookupError, pickle.UnpicklingError) as error:
        # The checkpoint may be intact if the machine failed, for example from lack of memory.
        if of_machine := machine_error(error):
            raise of_machine from None
        reason = str(error).partition("\n")[0]
        print(f"{path} is damaged ({reason}): starting from the beginning", flush=True)
        return None
    return saved


@dataclass
class StopRequest:
    """The signal that asked this process to stop; 0 if none did."""

    signal: int = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While the block runs, a first SIGTERM or Ctrl-C is a request. A later one acts at once."""
    request = StopRequest()
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    asked = 0.0

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if not request.signal:
            request.signal, asked = number, time.monotonic()
        elif time.monotonic() - asked > SECONDS_OF_ONE_REQUEST:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    for number in STOP_SIGNALS:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        restore()


@dataclass
class Watch:
    """Checks on a training from time to time: finite losses, checkpoints, requests to stop.

    All processes do so after the same steps, by exchanging one small vector. Only then does a step
    wait for the device.
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
        """Look if it is time to. `images` is the number that all processes have seen this epoch."""
        self._steps += 1
        if self._steps >= self._steps_to_look:
            self.look(state, images)

    def look(self, state: TrainingState, images: int, *, save: bool = False) -> tuple[float, float]:
        """Check the losses, and write a checkpoint if one is due.

        Returns this epoch's sum of losses and number of correct predictions over all processes.
        Raises NotFiniteError; or, once a checkpoint has been written, Stopped if any process was
        asked to stop.
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
        """At most twice as many as before this look, because the first steps are slow."""
        seconds = min(SECONDS_BETWEEN_LOOKS, self.seconds_between_checkpoints)
        fitting = self._steps * seconds / max(1e-9, now - self._looked)
        return max(1, min(int(fitting), 2 * self._steps_to_look))

    def stop_if_asked(self, where: str) -> None:
        """For use after a checkpoint has been written: no process waits for the others."""
        if self.request.signal:
            raise Stopped(self.request.signal, where)
