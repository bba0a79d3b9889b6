"""Starting the processes that train together, and hearing how they ended."""

import multiprocessing
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import torch
from torch.distributed import DistError
from torch.multiprocessing.spawn import (
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from stages.runtime.errors import Stopped, UserError
from stages.training.checkpoint import STOP_SIGNALS

# After one has ended badly: for the others to write a checkpoint, or to notice.
GRACE_SECONDS = 60


def process_count(wanted: int | str) -> int:
    """How many processes `train.processes` means here: auto is one per GPU, or one."""
    gpus = torch.cuda.device_count()
    if wanted == "auto":
        return max(1, gpus)
    if 0 < gpus < int(wanted):
        raise UserError(f"train.processes is {wanted}, but there are {gpus} GPUs: use auto")
    return int(wanted)


def run_processes(count: int, work: Callable[..., str], *arguments: str) -> str:
    """work(*arguments) in `count` processes of this machine; what the first of them returns.

    In this very process where count is 1, or where torchrun has started it beside others. Raises
    what one of the processes raised, of UserError and Stopped; the others end then too.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _run_beside_others(work, *arguments)
    if count == 1:
        return work(*arguments)
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    settings = (count, _free_port(), answers, work, arguments)
    running: Any = start_processes(_run_one, settings, count, join=False)  # type: ignore[no-untyped-call]
    with _forwarded_signals(running.processes) as received:
        try:
            while not running.join(grace_period=GRACE_SECONDS):
                pass
        except (ProcessExitedException, ProcessRaisedException) as error:
            # First what one of them said: others end with whatever its end makes of their exchange.
            _raise_first(answers)
            if isinstance(error, ProcessRaisedException):
                raise
            raise UserError(f"{error}; the next run goes on from the last checkpoint") from None
    if received and answers.empty():
        raise Stopped(received[0], "before its first step")
    return str(answers.get()[1])


def _run_beside_others(work: Callable[..., str], *arguments: str) -> str:
    """work(*arguments); where the others are lost, a UserError says so, since they cannot."""
    try:
        return work(*arguments)
    except RuntimeError as error:
        if not isinstance(error, DistError) and "/gloo/transport/" not in str(error):
            raise
        # Without the place in the C++ source before it, and the advice for programmers after it.
        reason = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0].splitlines()[0]
        raise UserError(
            f"the exchange with the other processes broke off ({reason}): see what they say; the"
            " next run goes on from the last checkpoint"
        ) from None


def _run_one(
    rank: int,
    count: int,
    port: int,
    answers: Any,
    work: Callable[..., str],
    arguments: tuple[str, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        text = work(*arguments)
    except UserError as error:
        answers.put(("error", str(error)))
        raise SystemExit(1) from None
    except Stopped as stopped:
        answers.put(("stopped", stopped.signal, stopped.where))
        raise SystemExit(128 + stopped.signal) from None
    if rank == 0:
        answers.put(("done", text))


def _raise_first(answers: Any) -> None:
    while not answers.empty():
        kind, *details = answers.get()
        if kind == "error":
            raise UserError(*details) from None
        if kind == "stopped":
            raise Stopped(*details) from None


@contextmanager
def _forwarded_signals(processes: list[BaseProcess]) -> Iterator[list[int]]:
    """While the block runs, requests to stop go on to the processes; gives those received."""
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    handlers = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
