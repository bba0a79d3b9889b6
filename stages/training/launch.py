"""Starting the processes that train together on this machine, as torchrun would."""

import logging
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from stages.runtime.command import explain
from stages.runtime.errors import Stopped, UserError

LAST_WORDS_SECONDS = 10


def process_count(wanted: int | str) -> int:
    """The number of processes for `run.processes`: auto is one per GPU, or one without a GPU."""
    gpus = torch.cuda.device_count()
    if wanted == "auto":
        return max(1, gpus)
    if 0 < gpus < int(wanted):
        raise UserError(f"run.processes is {wanted}, but there are {gpus} GPUs: use auto")
    return int(wanted)


def run_processes(count: int, work: Callable[..., str], *arguments: str) -> str:
    """Call work(*arguments) in `count` processes, and return the first one's result.

    If `count` is 1, or if torchrun started this process, the call is made in this process.
    Otherwise an error in one process ends the others and is raised here, and SIGTERM and Ctrl-C are
    passed on to all of them.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _run_beside_others(work, *arguments)
    if count == 1:
        return work(*arguments)
    # torchrun logs a traceback for every error, which is also raised here.
    logging.disable(logging.CRITICAL)
    # Seconds for writing a checkpoint after a request to stop.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "60")
    errors = multiprocessing.get_context("spawn").SimpleQueue()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="train",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT",
    )
    try:
        return str(elastic_launch(config, _run_one)(work, arguments, errors)[0])
    except SignalException as ended:
        if errors.empty():
            raise Stopped(ended.sigval, "before its first step") from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise UserError(
                f"process {rank} was ended by {failure.signal_name()}; the next run continues from"
                " the last checkpoint"
            ) from None
        if errors.empty():
            raise
    # The first error is the cause: later ones only say that another process is gone.
    raise errors.get()


def _run_one(work: Callable[..., str], arguments: tuple[str, ...], errors: Any) -> str:
    """Call work, and send any error that is not a bug to the process that started this one."""
    try:
        return work(*arguments)
    except Stopped as stopped:
        errors.put(stopped)
        raise
    except Exception as error:
        if line := explain(error):
            errors.put(UserError(line))
        elif _is_lost_exchange(error):
            # Another process failed first and may not have reported why yet. torchrun ends this
            # process as soon as that one has ended.
            time.sleep(LAST_WORDS_SECONDS)
        raise


def _is_lost_exchange(error: Exception) -> bool:
    """Whether the error only says that another process is gone."""
    return isinstance(error, DistError) or "/gloo/transport/" in str(error)


def _run_beside_others(work: Callable[..., str], *arguments: str) -> str:
    """Call work; raise UserError if the connection to another process is lost."""
    try:
        return work(*arguments)
    except RuntimeError as error:
        if not _is_lost_exchange(error):
            raise
        # Leave out the position in the C++ source and the advice to programmers.
        reason = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0].splitlines()[0]
        raise UserError(
            f"the connection to the other processes broke off ({reason}): see their output for the"
            " cause; the next run continues from the last checkpoint"
        ) from None
