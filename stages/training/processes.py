"""The processes that train together: how they divide work and exchange values."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from stages.imaging.loader import CPU
from stages.runtime.errors import UserError
from stages.runtime.machine import usable_cores

T = TypeVar("T")

# How long a process waits for the others, which may be packing photographs or compiling. The end
# of a process is noticed at once, but a machine may lose its power or network.
MOST_SILENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class Processes:
    """This process among those that train one model together; by default it is the only one.

    `rank` numbers the processes of all machines, `local_rank` those of this machine. Each process
    has one device.
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
        """This process's consecutive part of `rows`. The sizes of parts differ by at most 1."""
        return np.array_split(rows, self.size)[self.rank]

    def gather(self, values: Tensor) -> Tensor:
        """The values of all processes, [processes, ...], in the order of their ranks."""
        if self.size == 1:
            return values[None]
        gathered = values.new_empty((self.size, *values.shape))
        torch.distributed.all_gather(list(gathered.unbind()), values)
        return gathered

    def agree(self, value: T) -> T:
        """The first process's value, returned in all of them."""
        if self.size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, 0, device=CPU)
        return values[0]

    def wait_for_all(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()

    def distribute(self, network: nn.Module) -> nn.Module:
        """The network in the form that is trained: gradients are averaged over all processes.

        Batch normalization uses the images of all processes, as in a single process. Raises
        UserError if it cannot, which is so on CPUs.
        """
        if self.size == 1:
            return network
        if self.device.type == "cuda":
            synchronize_batch_norm(network)
        elif has_batch_norm(network):
            raise UserError(
                "batch normalization cannot be shared by several processes on CPUs: set"
                " run.processes to 1"
            )
        # In a ViT this is about a few kB.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        # A static graph allows unused parameters, which some networks of transformers have. But it
        # does not support no_sync, so gradients are exchanged after each part of a batch.
        return DistributedDataParallel(network, gradient_as_bucket_view=True, static_graph=True)


def synchronize_batch_norm(network: nn.Module) -> None:
    """Let batch normalization use the images of all processes."""
    if type(network).__module__.startswith("timm."):
        from stages.networks import timm_models  # noqa: PLC0415 - timm is optional

        timm_models.synchronize_batch_norm(network)
    else:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]


def has_batch_norm(network: nn.Module, *, training: bool = False) -> bool:
    """Whether a layer normalizes batches, or if `training`, by each batch's own statistics."""
    layers = (module for module in network.modules() if isinstance(module, _BatchNorm))
    return any(layer.training or not training for layer in layers)


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the other processes, if torchrun's environment variables say that there are any."""
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
