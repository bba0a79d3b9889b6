"""The random plan of an epoch, and how batches are divided into parts and among processes."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.imaging.loader import Bins
from stages.networks.classifier import Classifier
from stages.networks.inference import class_numbers
from stages.runtime.params import ModelParams
from stages.training.processes import Processes


@dataclass(frozen=True)
class EpochPlan:
    """What an epoch draws before it begins.

    `order` has the rows of the bins. The tensors are in that order and on the device, so that a
    step takes slices of them and waits for no copy. `parts[step]` are the slices that this process
    works on in that step, one after another; `sizes[step]` is the images of all processes in it.
    """

    order: NDArray[np.int64]
    targets: Tensor
    flips: Tensor | None
    jitters: Tensor | None
    parts: list[list[slice]]
    sizes: list[int]


def plan_epoch(
    bins: Bins, classifier: Classifier, params: ModelParams, processes: Processes, epoch: int
) -> EpochPlan:
    """Draw an epoch's order, flips and colours, the same for any number of processes."""
    random = np.random.default_rng([params.seed, epoch])
    order = random.permutation(len(bins))
    flipped = random.random(len(bins)) < 0.5
    factors = 1 + params.color_jitter * random.uniform(-1, 1, (len(bins), 3))
    batches = split_into_batches(len(bins), params.batch_size)

    def on_device(values: Tensor) -> Tensor:
        return values[order].to(classifier.device)

    return EpochPlan(
        order,
        targets=on_device(class_numbers(bins, classifier.labels)),
        flips=on_device(torch.from_numpy(flipped)) if params.horizontal_flip else None,
        jitters=on_device(torch.from_numpy(factors)) if params.color_jitter else None,
        parts=[split_into_parts(batch, params.accumulation, processes) for batch in batches],
        sizes=[len(batch) for batch in batches],
    )


def split_into_batches(images: int, batch_size: int) -> list[NDArray[np.int64]]:
    """The positions 0 to images - 1 in batches. A last batch of one joins the batch before it."""
    positions = np.arange(images)
    starts = list(range(batch_size, images, batch_size))
    if batch_size > 1 and starts and images - starts[-1] == 1:
        starts.pop()
    return np.split(positions, starts)


def part_count(images: int, accumulation: int) -> int:
    """The number of parts that a batch is divided into, so that none has a single image.

    Batch normalization cannot compute statistics of one image whose features are a single pixel.
    """
    return max(1, min(accumulation, images // 2))


def split_into_parts(
    batch: NDArray[np.int64], accumulation: int, processes: Processes
) -> list[slice]:
    """This process's share of each part of a batch, as slices, which may be empty."""
    parts = np.array_split(batch, part_count(len(batch), accumulation))
    shares = [processes.share(part) for part in parts]
    return [slice(share[0], share[-1] + 1) if len(share) else slice(0) for share in shares]
