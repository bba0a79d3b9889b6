"""Training and evaluating a classifier: one engine for every network."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from stages.core import params
from stages.core.command import UserError
from stages.core.loader import Bins, load_batches
from stages.core.networks import Classifier

OPTIMIZERS: dict[str, type[Adam]] = {"adam": Adam, "adamw": AdamW}
# Progress shows the loss this often; reading it waits for the device.
SHOW_EVERY_STEPS = 20


@dataclass(frozen=True)
class Epoch:
    """One row of curves.csv. Losses are means of cross-entropy in nats, accuracies are shares."""

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


@dataclass(frozen=True)
class Scores:
    """What evaluation gives: the mean loss, the accuracy, and probabilities [bins, labels]."""

    loss: float
    accuracy: float
    probabilities: NDArray[np.float32]


def place(classifier: Classifier) -> None:
    """Move the network to the GPU, if there is one, in the memory format that is fastest."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier.network.to(device).to(memory_format=torch.channels_last)


def train(
    classifier: Classifier, train_bins: Bins, test_bins: Bins, model: params.Model
) -> Iterator[Epoch]:
    """Train in place, epoch by epoch. Raises UserError when the loss is no longer finite.

    Everything random comes from `model.seed`: each epoch's order and flips from that and the
    epoch's number alone.
    """
    steps = model.epochs * math.ceil(len(train_bins) / model.batch_size)
    optimizer = OPTIMIZERS[model.optimizer](
        classifier.network.parameters(),
        lr=model.learning_rate,
        weight_decay=model.weight_decay,
        fused=True,
    )
    scheduler = LambdaLR(optimizer, learning_rate_schedule(model, steps))
    for epoch in range(1, model.epochs + 1):
        loss, accuracy = train_one_epoch(classifier, train_bins, model, epoch, optimizer, scheduler)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of epoch {epoch} is {loss}: lower this model's learning_rate"
                f" ({model.learning_rate:g})"
            )
        test = evaluate(classifier, test_bins, 2 * model.batch_size)
        yield Epoch(epoch, loss, accuracy, test.loss, test.accuracy)


def train_one_epoch(
    classifier: Classifier,
    bins: Bins,
    model: params.Model,
    epoch: int,
    optimizer: Optimizer,
    scheduler: LambdaLR,
) -> tuple[float, float]:
    """One pass over the bins in a random order; the mean loss and the accuracy during it."""
    random = np.random.default_rng([model.seed, epoch])
    order = random.permutation(len(bins))
    flipped = torch.from_numpy(random.random(len(bins)) < 0.5) if model.horizontal_flip else None
    targets = class_numbers(bins, classifier.labels)
    device = classifier.device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    classifier.network.train()
    progress = progress_bar(bins, f"epoch {epoch}/{model.epochs}")
    for step, batch in enumerate(load_batches(bins, order, model.batch_size)):
        images = normalize(batch.images.to(device), classifier)
        if flipped is not None:
            images = flip(images, flipped[batch.rows].to(device))
        target = targets[batch.rows].to(device)
        with autocast(device):
            logits = classifier.logits(images).float()
        loss = cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        correct = (logits.argmax(1) == target).sum()
        totals += torch.stack([loss.detach() * len(target), correct])
        progress.update(len(target))
        if step % SHOW_EVERY_STEPS == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    progress.close()
    mean_loss, accuracy = (totals / len(bins)).tolist()
    return mean_loss, accuracy


@torch.inference_mode()
def evaluate(classifier: Classifier, bins: Bins, batch_size: int) -> Scores:
    """Score every bin once."""
    device = classifier.device
    targets = class_numbers(bins, classifier.labels)
    classifier.network.eval()
    outputs = []
    progress = progress_bar(bins, "evaluate")
    for batch in load_batches(bins, np.arange(len(bins)), batch_size):
        with autocast(device):
            logits = classifier.logits(normalize(batch.images.to(device), classifier))
        outputs.append(logits.float())
        progress.update(len(batch.rows))
    progress.close()
    logits = torch.cat(outputs).cpu()
    return Scores(
        loss=cross_entropy(logits, targets).item(),
        accuracy=(logits.argmax(1) == targets).double().mean().item(),
        probabilities=logits.softmax(1).numpy(),
    )


def progress_bar(bins: Bins, description: str) -> "tqdm[Never]":
    """On a terminal only: a log has a line per epoch."""
    return tqdm(total=len(bins), desc=description, unit=" images", disable=None, leave=False)


def class_numbers(bins: Bins, labels: list[int]) -> Tensor:
    """Each bin's quantity as its place in `labels`, int64 [bins]. Raises UserError for others."""
    numbers = {label: number for number, label in enumerate(labels)}
    unknown = set(bins.quantities.tolist()) - set(labels)
    if unknown:
        raise UserError(f"the model knows the quantities {labels}, not {sorted(unknown)}")
    return torch.tensor([numbers[quantity] for quantity in bins.quantities.tolist()])


def normalize(images: Tensor, classifier: Classifier) -> Tensor:
    """uint8 images to floats of mean 0 and deviation 1 per channel, for `mean` and `std`."""
    mean = torch.tensor(classifier.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(classifier.std, device=images.device).view(3, 1, 1)
    return (images / 255 - mean) / std


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror those images [batch, 3, height, width] that `flipped` [batch] says."""
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)


def learning_rate_schedule(model: params.Model, steps: int) -> Callable[[int], float]:
    """The learning rate's factor at each step: warm-up from 0, then constant or linear to 0."""

    def factor(step: int) -> float:
        if step < model.warmup_steps:
            return step / model.warmup_steps
        if model.schedule == "constant":
            return 1.0
        return max(0.0, (steps - step) / max(1, steps - model.warmup_steps))

    return factor


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the hardware computes in it; elsewhere emulating it costs time."""
    if device.type == "cuda":
        capable = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        capable = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=capable)
