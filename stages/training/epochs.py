"""The random plan of an epoch, and how batches are divided into parts and among processes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from stages.imaging.loader import Bins
from stages.networks.calibration import positions_of
from stages.networks.classifier import Classifier
from stages.runtime.counts import open_label
from stages.runtime.params import ModelParams
from stages.training.augmentation import (
    Change,
    blur,
    flip,
    jitter_colors,
    put_side_by_side,
    warp,
)
from stages.training.processes import Processes

# Each has random numbers of its own, so that none changes what another draws. They start at 1,
# because numpy fills a seed with zeros, and [seed, epoch] is the seed of the order.
PARTNERS, SIDES, BLURS, WARPS = range(1, 5)


@dataclass(frozen=True)
class EpochPlan:
    """What an epoch draws before it begins.

    `order` has the rows of the bins; `partners` the row of the bin that is put beside each, or -1.
    `changes` are made one after another, with a value or more for each image. They and `targets`
    are in that order and on the device, so that a step takes slices of them and waits for no copy.
    `parts[step]` are the slices that this process works on in that step, one after another;
    `sizes[step]` is the images of all processes in it.
    """

    order: NDArray[np.int64]
    partners: NDArray[np.int64]
    targets: Tensor
    changes: dict[Change, Tensor]
    parts: list[list[slice]]
    sizes: list[int]

    def rows(self, part: slice) -> NDArray[np.int64]:
        """The rows of the bins to load for a part: its own, then their partners."""
        partners = self.partners[part]
        return np.concatenate([self.order[part], partners[partners >= 0]])

    def augment(self, images: Tensor, part: slice) -> Tensor:
        """The images of a part, from those at its `rows` with values from 0 to 1."""
        for change, values in self.changes.items():
            images = change(images, values[part])
        return images


def plan_epoch(
    bins: Bins, classifier: Classifier, params: ModelParams, processes: Processes, epoch: int
) -> EpochPlan:
    """Draw an epoch's order, partners and changes, the same for any number of processes."""
    random = np.random.default_rng([params.seed, epoch])
    order = random.permutation(len(bins))
    classes = positions_of(bins.quantities, classifier.labels)
    sums = sum_classes(classifier.labels)
    partners = draw_partners(classes, sums, params, epoch)
    changes = draw_changes(partners, params, epoch, random)
    batches = split_into_batches(len(bins), params.batch_size)

    def on_device(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values[order]).to(classifier.device)

    return EpochPlan(
        order,
        partners[order],
        targets=on_device(np.where(partners < 0, classes, sums[classes, classes[partners]])),
        changes={change: on_device(values) for change, values in changes.items()},
        parts=[split_into_parts(batch, params.accumulation, processes) for batch in batches],
        sizes=[len(batch) for batch in batches],
    )


def sum_classes(labels: list[int]) -> NDArray[np.int64]:
    """The class of the sum of any two labels, [labels, labels]; -1 if the sum has none."""
    numbers = {label: number for number, label in enumerate(labels)}
    highest = open_label(labels)

    def class_of(total: int) -> int:
        return numbers.get(total if highest is None else min(total, highest), -1)

    return np.array([[class_of(one + other) for other in labels] for one in labels])


def draw_partners(
    classes: NDArray[np.int64], sums: NDArray[np.int64], params: ModelParams, epoch: int
) -> NDArray[np.int64]:
    """The row of the bin that is put beside each bin, int64 [bins]; -1 for none.

    A share of the bins is drawn, and each gets one of the bins with which its sum is a class, all
    of them equally likely. Bins without any get none. So high counts become more frequent.
    """
    random = _random(params, epoch, PARTNERS)
    partners = np.full(len(classes), -1)
    drawn = random.random(len(classes)) < params.side_by_side
    for number, row in enumerate(sums):
        possible = np.flatnonzero(row[classes] >= 0)
        if len(possible):
            own = np.flatnonzero(drawn & (classes == number))
            partners[own] = random.choice(possible, len(own))
    return partners


def draw_changes(
    partners: NDArray[np.int64], params: ModelParams, epoch: int, random: Generator
) -> dict[Change, NDArray[Any]]:
    """The changes that are turned on, in their order, with the values for each bin.

    The warp comes after the colors and the blur, so that the black it brings in stays black.
    """
    bins = len(partners)
    flipped = random.random(bins) < 0.5
    factors = 1 + params.color_jitter * random.uniform(-1, 1, (bins, 3))
    changes: dict[Change, NDArray[Any]] = {}
    if params.side_by_side:
        sides = _random(params, epoch, SIDES).choice([-1, 1], bins)
        changes[put_side_by_side] = np.where(partners < 0, 0, sides)
    if params.color_jitter:
        changes[jitter_colors] = factors
    if params.blur:
        changes[blur] = params.blur * _random(params, epoch, BLURS).random(bins)
    if params.rotation or params.shift:
        moves = _random(params, epoch, WARPS).uniform(-1, 1, (bins, 3))
        changes[warp] = moves * [params.rotation, params.shift, params.shift]
    if params.horizontal_flip:
        changes[flip] = flipped
    return changes


def _random(params: ModelParams, epoch: int, purpose: int) -> Generator:
    return np.random.default_rng([params.seed, epoch, purpose])


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
