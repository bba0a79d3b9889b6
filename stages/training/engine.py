"""Training a classifier: one engine for every network, on one or several devices."""

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stages.imaging.loader import Bins, load_batches
from stages.networks.classifier import (
    Classifier,
    checkpoint_gradients,
    freeze_backbone,
    freeze_first_layers,
    logits_of,
)
from stages.networks.inference import (
    Scores,
    autocast,
    normalizer,
    predict,
    progress_bar,
    scale,
    scores_of,
)
from stages.runtime.errors import UserError
from stages.runtime.params import ModelParams
from stages.training.checkpoint import NotFiniteError, TrainingState, Watch
from stages.training.compilation import compile_for
from stages.training.epochs import EpochPlan, part_count, plan_epoch, split_into_batches
from stages.training.losses import training_loss
from stages.training.optimization import learning_rate, make_optimizer, set_learning_rate
from stages.training.processes import Processes, has_batch_norm


@dataclass(frozen=True)
class Epoch:
    """One row of curves.csv. Losses are means of cross-entropy in nats, accuracies are shares."""

    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float


class Trainer:
    """Trains a classifier that is already on its device.

    All random numbers are derived from `seed` and the numbers of the epoch, step and process, so a
    resumed training takes the same steps as an undisturbed one. Raises UserError if the network
    cannot be trained with these params and processes.
    """

    def __init__(
        self,
        classifier: Classifier,
        train_bins: Bins,
        validation_bins: Bins,
        params: ModelParams,
        evaluate_batch_size: int,
        processes: Processes | None = None,
    ) -> None:
        self.classifier = classifier
        self.train_bins = train_bins
        self.validation_bins = validation_bins
        self.params = params
        self.evaluate_batch_size = evaluate_batch_size
        self.processes = processes or Processes()
        freeze(classifier, params)
        set_training_mode(classifier.network, params)
        self.normalizes_batches = has_batch_norm(classifier.network, training=True)
        if self.normalizes_batches:
            refuse_single_images(len(train_bins), params.batch_size)
        if params.checkpoint_gradients:
            if self.normalizes_batches:
                raise UserError(
                    "checkpoint_gradients computes layers twice, so batch normalization would count"
                    " each batch twice: set this model's checkpoint_gradients to false"
                )
            checkpoint_gradients(classifier.network)
        self.state = start_state(classifier, params)
        self.module = self.processes.distribute(classifier.network)
        device = classifier.device
        self.compiled, self.compiling_problem = compile_for(self.module, device, params)
        self.normalize = normalizer(classifier)

    @property
    def steps(self) -> int:
        """The number of steps in an epoch."""
        return len(split_into_batches(len(self.train_bins), self.params.batch_size))

    @property
    def trained(self) -> Classifier:
        """The classifier with the moving average of its weights if there is one, else with them.

        Once `train` has given the last row, these are the weights of `kept_epoch`.
        """
        if self.state.average is None:
            return self.classifier
        averaged: Any = self.state.average.module
        return replace(self.classifier, network=averaged)

    @property
    def kept_epoch(self) -> int:
        """The epoch whose weights are kept at the end of the training."""
        if self.params.keep == "last":
            return self.params.epochs
        return best_epoch(self.state.history)

    def train(self, watch: Watch | None = None) -> Iterator[Epoch]:
        """Train from the current state, and yield the row of every epoch, including finished ones.

        Raises UserError if a loss is not finite or a batch does not fit into the GPU's memory, and
        Stopped if the watch was asked to stop.
        """
        watch = watch or Watch(self.processes)
        for epoch in range(1, self.params.epochs + 1):
            if epoch > self.state.epoch:
                self.state.start_epoch(epoch)
            if epoch == self.state.epoch:
                row = *self.train_one_epoch(watch), *self.validate(watch)
                self.state.history[epoch - 1] = torch.tensor(row, dtype=torch.float64)
                if self.params.keep == "best" and best_epoch(self.state.history[:epoch]) == epoch:
                    self.state.best = copy_of_weights(self.trained.network)
            yield Epoch(epoch, *self.state.history[epoch - 1].tolist())
        if self.state.best is not None:
            self.trained.network.load_state_dict(self.state.best)

    def train_one_epoch(self, watch: Watch) -> tuple[float, float]:
        """Finish the current pass over the bins; returns the epoch's mean loss and accuracy."""
        state, params = self.state, self.params
        plan = plan_epoch(self.train_bins, self.classifier, params, self.processes, state.epoch)
        rows = [plan.rows(part) for parts in plan.parts[state.step :] for part in parts]
        batches = load_batches(
            self.train_bins, rows, self.classifier.device, self.processes.loader_threads
        )
        set_training_mode(self.module, params)
        seen = sum(plan.sizes[: state.step])
        description = f"epoch {state.epoch}/{params.epochs}"
        out_of_memory = False
        with closing(batches), progress_bar(len(plan.order), description) as progress:
            images = (batch.images for batch in batches)
            progress.update(seen)
            try:
                for size in plan.sizes[state.step :]:
                    self.train_step(plan, images)
                    seen += size
                    progress.update(size)
                    watch.after_step(state, seen)
                    progress.set_postfix(loss=f"{watch.mean_loss:.3f}", refresh=False)
                # Before validation, so that a run killed during validation only repeats that.
                loss, right = watch.look(state, seen, save=True)
            except NotFiniteError as error:
                raise self.not_finite(error.step, len(plan.sizes)) from None
            except torch.OutOfMemoryError:
                out_of_memory = True
        if out_of_memory:
            # Not in the except block, in which the exception keeps the failed step's tensors.
            raise self.too_large()
        return loss / seen, right / seen

    def train_step(self, plan: EpochPlan, images: Iterator[Tensor]) -> None:
        """Take one step of the optimizer with the next images of this process."""
        state, params = self.state, self.params
        step, steps, size = state.step, len(plan.sizes), plan.sizes[state.step]
        rate = learning_rate(params, (state.epoch - 1) * steps + step, params.epochs * steps)
        set_learning_rate(state.optimizer, rate)
        seed_dropout(params.seed, state.epoch, step, self.processes.rank, self.classifier.device)
        # It was compiled for full batches; the last batch of an epoch may be smaller or larger.
        forward = self.compiled if size == params.batch_size else self.module
        for part in plan.parts[step]:
            self.add_gradients(forward, plan, part, next(images), size)
        if params.clip_norm is not None:
            clip_grad_norm_(self.module.parameters(), params.clip_norm)
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
        """Go forward and backward with a part of a batch of `size` images; add to the totals."""
        params, targets, totals = self.params, plan.targets[part], self.state.totals
        images = scale(images / 255, self.classifier.size)
        images = self.normalize(plan.augment(images, part))
        if blank := len(images) == 0 and not self.normalizes_batches:
            # Some networks of transformers fail on an empty batch.
            images = images.new_zeros(1, *images.shape[1:])
        with autocast(images.device, params.precision):
            logits = logits_of(forward(images)).float()
        if blank:
            logits = logits[:0]
        losses = training_loss(logits, targets, params.label_smoothing, params.ordinal_share)
        # DistributedDataParallel averages over processes. This makes it the mean over all images.
        loss = losses.sum() * (self.processes.size / size)
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            totals[0] += cross_entropy(logits, targets, reduction="sum")
            totals[1] += (logits.argmax(1) == targets).sum()
            first_bad = totals[2].clamp(max=self.state.step)
            totals[2] = torch.where(loss.isfinite(), totals[2], first_bad)

    def validate(self, watch: Watch) -> tuple[float, float]:
        """The loss and accuracy on the validation bins after an epoch."""
        scores = self.score_validation(watch)
        if not math.isfinite(scores.loss):
            raise UserError(
                f"the validation loss is {scores.loss} after epoch {self.state.epoch}: lower this"
                f" model's learning_rate ({self.params.learning_rate:g})"
            )
        return scores.loss, scores.accuracy

    def score_validation(self, watch: Watch) -> Scores:
        """The scores of `trained`. Each process scores a share, and all get the same scores."""
        bins, trained = self.validation_bins, self.trained
        processes, epoch = self.processes, self.state.epoch
        rows = processes.share(np.arange(len(bins)))
        logits = torch.zeros(len(bins), len(trained.labels), device=trained.device)
        logits[torch.from_numpy(rows)] = predict(
            trained,
            bins,
            self.evaluate_batch_size,
            rows,
            lambda: watch.stop_if_asked(f"while validating epoch {epoch}"),
            processes.loader_threads,
        )
        return scores_of(processes.gather(logits).sum(0), bins, trained.labels)

    def not_finite(self, step: int, steps: int) -> UserError:
        params, epoch = self.params, self.state.epoch
        rate = learning_rate(params, (epoch - 1) * steps + step, params.epochs * steps)
        return UserError(
            f"the loss is not finite at step {step + 1} of epoch {epoch}, at a learning rate of"
            f" {rate:g}: lower this model's learning_rate ({params.learning_rate:g}), or set its"
            " clip_norm to 1.0. The last good checkpoint is kept"
        )

    def too_large(self) -> UserError:
        """An error for a part of a batch that does not fit into the GPU's memory.

        It names an accumulation that was tried and fits. The memory has to hold one process's
        share of the largest part of the largest batch.
        """
        params, device = self.params, self.classifier.device
        largest = max(map(len, split_into_batches(len(self.train_bins), params.batch_size)))

        def largest_part(accumulation: int) -> int:
            return math.ceil(largest / part_count(largest, accumulation))

        def at_once(accumulation: int) -> int:
            return math.ceil(largest_part(accumulation) / self.processes.size)

        accumulation, images = params.accumulation, at_once(params.accumulation)
        problem = f"{images} images of {self.classifier.size} pixels do not fit into {device}"
        while images > at_once(params.batch_size):
            accumulation = min(2 * accumulation, params.batch_size)
            images = at_once(accumulation)
            if self.fits(images):
                advice = (
                    f"{problem}: set this model's accumulation to {accumulation}, and {images} at"
                    f" once fit; batch_size stays {params.batch_size}"
                )
                if self.normalizes_batches:
                    advice += (
                        ", but batch normalization then takes its statistics from parts of"
                        f" {largest_part(accumulation)} images, which changes the result"
                    )
                return UserError(advice)
        return UserError(
            f"{problem}, whatever this model's accumulation: lower its image_size, or free the"
            " GPU's memory"
        )

    def fits(self, images: int) -> bool:
        """Whether the memory suffices to go forward and backward with this number of images."""
        self.state.optimizer.zero_grad()
        torch.cuda.empty_cache()
        # Like a step of training, but without the two parts that wait for other processes: batch
        # normalization, and the gradients' exchange in backward().
        network = self.classifier.network.eval()
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        size, device = self.classifier.size, self.classifier.device
        try:
            batch = torch.zeros(images, 3, size, size, device=device)
            with autocast(device, self.params.precision):
                logits = logits_of(network(batch.to(memory_format=torch.channels_last)))
            torch.autograd.grad(logits.float().sum(), trained, allow_unused=True)
        except torch.OutOfMemoryError:
            return False
        return True


def freeze(classifier: Classifier, params: ModelParams) -> None:
    if params.freeze_backbone:
        freeze_backbone(classifier)
    elif params.freeze:
        freeze_first_layers(classifier, params.freeze)


def set_training_mode(module: nn.Module, params: ModelParams) -> None:
    """Let batch normalization and dropout work as in training, but in frozen layers as in use."""
    module.train(not params.freeze_backbone)
    for part in module.modules():
        weights = [*part.parameters()]
        if weights and not any(weight.requires_grad for weight in weights):
            part.eval()


def refuse_single_images(images: int, batch_size: int) -> None:
    """Raise UserError if a batch would have a single image."""
    if min(map(len, split_into_batches(images, batch_size))) == 1:
        remedy = "raise split.train" if images == 1 else "set this model's batch_size to 2 or more"
        raise UserError(f"batch normalization needs two or more images at once, not one: {remedy}")


def best_epoch(history: Tensor) -> int:
    """The epoch with the highest validation accuracy, the earliest one if several are equal.

    `history` [epochs, values] has the rows of Epoch without their first column.
    """
    column = [field.name for field in fields(Epoch)].index("validation_accuracy") - 1
    accuracies = history[:, column].tolist()
    return 1 + accuracies.index(max(accuracies))


def copy_of_weights(network: nn.Module) -> dict[str, Tensor]:
    """The network's state dict, copied to the CPU."""
    # Changed in place, because torch keeps the versions of the layers in an attribute of this
    # dictionary, and some networks of torchvision cannot load weights without them.
    weights: dict[str, Tensor] = network.state_dict()
    for name, weight in weights.items():
        weights[name] = weight.to("cpu", copy=True)
    return weights


def start_state(classifier: Classifier, params: ModelParams) -> TrainingState:
    average = None
    if params.ema_decay is not None:
        average = AveragedModel(
            classifier.network,
            multi_avg_fn=moving_average(params.ema_decay),
            use_buffers=True,
        )
    return TrainingState(
        classifier.network,
        make_optimizer(classifier, params),
        average,
        totals=torch.tensor([0, 0, math.inf], dtype=torch.float64, device=classifier.device),
        history=torch.zeros(params.epochs, len(fields(Epoch)) - 1, dtype=torch.float64),
    )


def moving_average(decay: float) -> Callable[..., None]:
    """The function with which AveragedModel updates tensors of one type.

    Integers are copied, not averaged, because they are counters.
    """
    of_weights = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def update(averages: list[Tensor], values: list[Tensor], steps: Tensor) -> None:
        if averages[0].is_floating_point():
            of_weights(averages, values, steps)
            return
        for average, value in zip(averages, values, strict=True):
            average.copy_(value)

    return update


def seed_dropout(seed: int, epoch: int, step: int, rank: int, device: torch.device) -> None:
    numbers = np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1, np.uint64)
    # torch.manual_seed would also look for absent devices, which takes half a millisecond.
    generator = torch.default_generator
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    generator.manual_seed(int(numbers[0]))
