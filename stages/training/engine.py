"""Training a classifier: one engine for every network, on one device or many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stages.imaging.loader import Bins, load_batches
from stages.networks.classifier import Classifier, freeze_backbone, logits_of
from stages.networks.inference import autocast, class_numbers, evaluate, normalizer, progress_bar
from stages.runtime.errors import UserError
from stages.training.augmentation import flip, jitter_colors
from stages.training.batch_norm import synchronize_batch_norm
from stages.training.checkpoint import NotFiniteError, TrainingState, Watch
from stages.training.losses import training_loss
from stages.training.optimization import learning_rate, make_optimizer, set_learning_rate
from stages.training.processes import Processes

# The knobs are only read, so that a machine without pydantic can train too.
if TYPE_CHECKING:
    from stages.runtime.params import Model


@dataclass(frozen=True)
class Epoch:
    """One row of curves.csv. Losses are means of cross-entropy in nats, accuracies are shares."""

    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    test_loss: float
    test_accuracy: float


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


class Trainer:
    """Trains a classifier that is on its device.

    Everything random comes from `seed` and the numbers of epoch, step and process, so that a
    training that goes on from `state` does what it would have done.
    """

    def __init__(
        self,
        classifier: Classifier,
        train_bins: Bins,
        validation_bins: Bins,
        test_bins: Bins,
        knobs: Model,
        evaluate_batch_size: int,
        processes: Processes | None = None,
    ) -> None:
        self.classifier = classifier
        self.train_bins = train_bins
        self.validation_bins = validation_bins
        self.test_bins = test_bins
        self.knobs = knobs
        self.evaluate_batch_size = evaluate_batch_size
        self.processes = processes or Processes()
        synchronize_batch_norm(classifier.network, self.processes)
        if knobs.freeze_backbone:
            freeze_backbone(classifier)
        self.state = start_state(classifier, knobs)
        self.module = distribute(classifier.network, self.processes)
        self.compiled = compile_for(self.module, classifier.device, knobs)
        self.normalize = normalizer(classifier)

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return len(split_into_batches(len(self.train_bins), self.knobs.batch_size))

    @property
    def trained(self) -> Classifier:
        """With the weights to keep: their moving average, where there is one."""
        if self.state.average is None:
            return self.classifier
        averaged: Any = self.state.average.module
        return replace(self.classifier, network=averaged)

    def train(self, watch: Watch | None = None) -> Iterator[Epoch]:
        """Go on from where the state is, and give every epoch's row, also of those before.

        Raises UserError when a loss is not finite or a batch does not fit into the GPU's memory,
        and Stopped when the watch was asked to.
        """
        watch = watch or Watch(self.processes)
        for epoch in range(1, self.knobs.epochs + 1):
            if epoch > self.state.epoch:
                self.state.start_epoch(epoch)
            if epoch == self.state.epoch:
                row = (
                    *self.train_one_epoch(watch),
                    *self.test(self.validation_bins, watch),
                    *self.test(self.test_bins, watch),
                )
                self.state.history[epoch - 1] = torch.tensor(row, dtype=torch.float64)
            yield Epoch(epoch, *self.state.history[epoch - 1].tolist())

    def train_one_epoch(self, watch: Watch) -> tuple[float, float]:
        """The rest of one pass over the bins in a random order; its mean loss and its accuracy."""
        state, knobs = self.state, self.knobs
        plan = plan_epoch(self.train_bins, self.classifier, knobs, self.processes, state.epoch)
        rows = [plan.order[part] for parts in plan.parts[state.step :] for part in parts]
        batches = load_batches(
            self.train_bins, rows, self.classifier.device, self.processes.loader_threads
        )
        images = (batch.images for batch in batches)
        # With the backbone frozen, its batch normalization and dropout rest too.
        self.module.train(not knobs.freeze_backbone)
        seen = sum(plan.sizes[: state.step])
        description = f"epoch {state.epoch}/{knobs.epochs}"
        out_of_memory = False
        with progress_bar(len(plan.order), description, self.processes) as progress:
            progress.update(seen)
            try:
                for size in plan.sizes[state.step :]:
                    self.train_step(plan, images)
                    seen += size
                    progress.update(size)
                    watch.after_step(state, seen)
                    progress.set_postfix(loss=f"{watch.mean_loss:.3f}", refresh=False)
                # Written before the test, which a killed run then only repeats.
                loss, right = watch.look(state, seen, save=True)
            except NotFiniteError as error:
                raise self.not_finite(error.step, len(plan.sizes)) from None
            except torch.OutOfMemoryError:
                out_of_memory = True
        if out_of_memory:
            # Here, where the failed step's tensors are gone with its exception.
            raise self.too_large()
        return loss / seen, right / seen

    def train_step(self, plan: EpochPlan, images: Iterator[Tensor]) -> None:
        """One step of the optimizer, on the next of this process's images."""
        state, knobs = self.state, self.knobs
        step, steps, size = state.step, len(plan.sizes), plan.sizes[state.step]
        rate = learning_rate(knobs, (state.epoch - 1) * steps + step, knobs.epochs * steps)
        set_learning_rate(state.optimizer, rate)
        seed_dropout(knobs.seed, state.epoch, step, self.processes.rank, self.classifier.device)
        # Compiled for one shape; what is left at the end of an epoch has another.
        forward = self.compiled if size == knobs.batch_size else self.module
        for part in plan.parts[step]:
            self.add_gradients(forward, plan, part, next(images), size)
        if knobs.clip_norm is not None:
            clip_grad_norm_(self.module.parameters(), knobs.clip_norm)
        state.optimizer.step()
        state.optimizer.zero_grad()
        if state.average is not None:
            state.average.update_parameters(self.classifier.network)
        state.step += 1

    def add_gradients(
        self,
        forward: Callable[[Tensor], Any],
        plan: EpochPlan,
        part: slice,
        images: Tensor,
        size: int,
    ) -> None:
        """Forward and backward of a part of a step of `size` images, counted in the totals."""
        knobs, targets, totals = self.knobs, plan.targets[part], self.state.totals
        images = images / 255
        if plan.jitters is not None:
            images = jitter_colors(images, plan.jitters[part])
        images = self.normalize(images)
        if plan.flips is not None:
            images = flip(images, plan.flips[part])
        with autocast(images.device):
            logits = logits_of(forward(images)).float()
        losses = training_loss(knobs.loss, logits, targets, knobs.label_smoothing)
        # DistributedDataParallel takes the mean over processes; wanted is that over all images.
        loss = losses.sum() * (self.processes.size / size)
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            totals[0] += cross_entropy(logits, targets, reduction="sum")
            totals[1] += (logits.argmax(1) == targets).sum()
            first_bad = totals[2].clamp(max=self.state.step)
            totals[2] = torch.where(loss.isfinite(), totals[2], first_bad)

    def test(self, bins: Bins, watch: Watch) -> tuple[float, float]:
        """The loss and accuracy of bins that are not trained on, after an epoch."""
        epoch = self.state.epoch
        scores = evaluate(
            self.trained,
            bins,
            self.evaluate_batch_size,
            self.processes,
            lambda: watch.stop_if_asked(f"while testing epoch {epoch}"),
        )
        if not math.isfinite(scores.loss):
            raise UserError(
                f"the loss is {scores.loss} on bins not trained on, after epoch {epoch}: lower this"
                f" model's learning_rate ({self.knobs.learning_rate:g})"
            )
        return scores.loss, scores.accuracy

    def not_finite(self, step: int, steps: int) -> UserError:
        knobs, epoch = self.knobs, self.state.epoch
        rate = learning_rate(knobs, (epoch - 1) * steps + step, knobs.epochs * steps)
        return UserError(
            f"the loss is not finite at step {step + 1} of epoch {epoch}, at a learning rate of"
            f" {rate:g}: lower this model's learning_rate ({knobs.learning_rate:g}), or set its"
            " clip_norm to 1.0. The last good checkpoint is kept"
        )

    def too_large(self) -> UserError:
        """What to do when a part of a batch did not fit into the GPU's memory; tries what would."""
        knobs, device = self.knobs, self.classifier.device
        failed = math.ceil(knobs.batch_size / knobs.accumulation / self.processes.size)
        problem = f"{failed} images of {self.classifier.size} pixels do not fit into {device}"
        images, accumulation = failed, knobs.accumulation
        while images > 1:
            accumulation = min(2 * accumulation, knobs.batch_size)
            images = math.ceil(knobs.batch_size / accumulation / self.processes.size)
            if self.fits(images):
                return UserError(
                    f"{problem}: set this model's accumulation to {accumulation}, and {images} at"
                    f" once fit; batch_size stays {knobs.batch_size}"
                )
        return UserError(f"{problem}, nor does one: lower resize.size, or free the GPU's memory")

    def fits(self, images: int) -> bool:
        """Whether so many go forward and backward in the memory that there is."""
        self.state.optimizer.zero_grad()
        torch.cuda.empty_cache()
        # As in training, but for what would wait for the other processes: batch normalization, and
        # what backward() does with gradients.
        network = self.classifier.network.eval()
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        size, device = self.classifier.size, self.classifier.device
        try:
            batch = torch.zeros(images, 3, size, size, device=device)
            with autocast(device):
                logits = self.classifier.logits(batch.to(memory_format=torch.channels_last))
            torch.autograd.grad(logits.float().sum(), trained, allow_unused=True)
        except torch.OutOfMemoryError:
            return False
        return True


def start_state(classifier: Classifier, knobs: Model) -> TrainingState:
    average = None
    if knobs.ema_decay is not None:
        average = AveragedModel(
            classifier.network,
            multi_avg_fn=moving_average(knobs.ema_decay),
            use_buffers=True,
        )
    return TrainingState(
        classifier.network,
        make_optimizer(classifier.network, knobs),
        average,
        totals=torch.tensor([0, 0, math.inf], dtype=torch.float64, device=classifier.device),
        history=torch.zeros(knobs.epochs, len(fields(Epoch)) - 1, dtype=torch.float64),
    )


def moving_average(decay: float) -> Callable[..., None]:
    """What AveragedModel calls with tensors of one type. Whole numbers are no weights: copied."""
    of_weights = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def update(averages: list[Tensor], values: list[Tensor], steps: Tensor) -> None:
        if averages[0].is_floating_point():
            of_weights(averages, values, steps)
            return
        for average, value in zip(averages, values, strict=True):
            average.copy_(value)

    return update


def distribute(network: nn.Module, processes: Processes) -> nn.Module:
    """The network, whose gradients become the mean over all processes."""
    if processes.size == 1:
        return network
    # In a static graph parameters may take no part, as some of transformers' do. It cannot
    # put off the exchange to a step's last part (no_sync), so that every part has one.
    return DistributedDataParallel(network, gradient_as_bucket_view=True, static_graph=True)


def compile_for(module: nn.Module, device: torch.device, knobs: Model) -> Callable[[Tensor], Any]:
    """By default compiled on a GPU only: on a CPU it makes ResNet34 slower."""
    wanted = device.type == "cuda" if knobs.compile == "auto" else knobs.compile
    return torch.compile(module, dynamic=False) if wanted else module


def plan_epoch(
    bins: Bins, classifier: Classifier, knobs: Model, processes: Processes, epoch: int
) -> EpochPlan:
    """An epoch's order, flips and colours, the same in all processes whatever their number."""
    random = np.random.default_rng([knobs.seed, epoch])
    order = random.permutation(len(bins))
    flipped = random.random(len(bins)) < 0.5
    factors = 1 + knobs.color_jitter * random.uniform(-1, 1, (len(bins), 3))
    batches = split_into_batches(len(bins), knobs.batch_size)
    device = classifier.device

    def on_device(values: Tensor) -> Tensor:
        return values[order].to(device)

    return EpochPlan(
        order,
        targets=on_device(class_numbers(bins, classifier.labels)),
        flips=on_device(torch.from_numpy(flipped)) if knobs.horizontal_flip else None,
        jitters=on_device(torch.from_numpy(factors)) if knobs.color_jitter else None,
        parts=[split_into_parts(batch, knobs.accumulation, processes) for batch in batches],
        sizes=[len(batch) for batch in batches],
    )


def split_into_batches(images: int, batch_size: int) -> list[NDArray[np.int64]]:
    """The places 0 to images - 1 in batches. A single one left over joins the batch before it.

    Batch normalization has nothing to normalize a single small image by.
    """
    places = np.arange(images)
    starts = list(range(batch_size, images, batch_size))
    if batch_size > 1 and starts and images - starts[-1] == 1:
        starts.pop()
    return np.split(places, starts)


def split_into_parts(
    batch: NDArray[np.int64], accumulation: int, processes: Processes
) -> list[slice]:
    """This process's share of each part of a batch, as slices, empty ones too."""
    parts = np.array_split(batch, min(accumulation, len(batch)))
    shares = [processes.share(part) for part in parts]
    return [slice(share[0], share[-1] + 1) if len(share) else slice(0) for share in shares]


def seed_dropout(seed: int, epoch: int, step: int, rank: int, device: torch.device) -> None:
    numbers = np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1, np.uint64)
    # Not torch.manual_seed, which also asks for devices that are not there: half of a millisecond.
    generator = torch.default_generator
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    generator.manual_seed(int(numbers[0]))
