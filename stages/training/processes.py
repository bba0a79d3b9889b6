"""The processes that train together: dividing the work, and exchanging values."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Tensor

from stages.runtime.machine import usable_cores

CPU = torch.device("cpu")
# For which a process waits for the others, of which one may pack photographs or compile meanwhile.
# An ended process is noticed at once; this is for a machine that vanishes without a word.
MOST_SILENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class Processes:
    """This process among those that train one model together; on its own by default.

    `rank` counts over all machines, `local_rank` on this one; every process has one device.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def loader_threads(self) -> int:
        """This process's share of the machine's cores."""
        return max(1, usable_cores() // self.local_size)

    def share(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The consecutive part of `rows` that is this process's; parts differ by 1 at most."""
        return np.array_split(rows, self.size)[self.rank]

    def gather(self, values: Tensor) -> Tensor:
        """[processes, ...]: these values of every process, in the order of their ranks."""
        if self.size == 1:
            return values[None]
        gathered = values.new_empty((self.size, *values.shape))
        torch.distributed.all_gather(list(gathered.unbind()), values)
        return gathered

    def broadcast(self, values: Tensor) -> None:
        """Overwrite `values` with those of the first process."""
        if self.size > 1:
            # A view of the same memory, whatever its format: NCCL takes only contiguous tensors.
            torch.distributed.broadcast(values.as_strided((values.numel(),), (1,)), 0)

    def agree(self, text: str) -> str:
        """The first process's text, in all of them."""
        if self.size == 1:
            return text
        texts = [text]
        torch.distributed.broadcast_object_list(texts, 0)
        return texts[0]

    def wait_for_all(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that the environment (torchrun's variables) tells of, if any."""
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    size, local_size = (
        int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    device = CPU
    if gpu := torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif local_size > 1:
        torch.set_num_threads(max(1, usable_cores() // local_size))
    processes = Processes(rank, size, local_rank, local_size, device)
    if size == 1:
        yield processes
        return
    # NCCL between GPUs, gloo between CPUs.
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    torch.distributed.init_process_group(backend, timeout=MOST_SILENCE)
    try:
        yield processes
    finally:
        torch.distributed.destroy_process_group()
