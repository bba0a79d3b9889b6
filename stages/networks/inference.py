"""A classifier at work: its device and precision, images in its form, and scores of bins."""

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from stages.imaging.loader import Bins, load_batches
from stages.networks.classifier import Classifier
from stages.runtime.errors import UserError


@dataclass(frozen=True)
class Scores:
    """What evaluation gives: the mean loss, the accuracy, and probabilities [bins, labels]."""

    loss: float
    accuracy: float
    probabilities: NDArray[np.float32]


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def place(classifier: Classifier, device: torch.device, *, deterministic: bool = False) -> None:
    """Move the network to its device, in the memory format that is fastest.

    `deterministic` makes a GPU give the same bits each time, at a cost; a CPU does so anyway.
    """
    if device.type == "cuda":
        if deterministic:
            # Read by cuBLAS when it starts; without it torch refuses to multiply matrices.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = not deterministic
        torch.use_deterministic_algorithms(deterministic)
    classifier.network.to(device).to(memory_format=torch.channels_last)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the hardware computes in it; elsewhere emulating it costs time."""
    if device.type == "cuda":
        capable = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        capable = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=capable)


def normalizer(classifier: Classifier) -> Callable[[Tensor], Tensor]:
    """A function from images of values from 0 to 1, on the network's device, to what it takes.

    Made once, since putting its constants on a GPU waits for it.
    """
    mean = torch.tensor(classifier.mean, device=classifier.device)
    std = torch.tensor(classifier.std, device=classifier.device)
    return lambda images: normalize(images, mean, std)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images of values from 0 to 1 to mean 0 and deviation 1 per channel; mean and std are [3]."""
    return (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)


@torch.inference_mode()
def predict(
    classifier: Classifier,
    bins: Bins,
    batch_size: int,
    rows: NDArray[np.int64] | None = None,
    before_batch: Callable[[], None] = lambda: None,
    threads: int | None = None,
) -> Tensor:
    """The logits of the bins at `rows`, or of all: float32 [rows, labels], on the network's device.

    `before_batch` is called before each batch is scored. `threads` decode, by default one per core.
    """
    device = classifier.device
    rows = np.arange(len(bins)) if rows is None else rows
    starts = range(0, len(rows), batch_size)
    batches = [rows[start : start + batch_size] for start in starts]
    logits = torch.empty(len(rows), len(classifier.labels), device=device)
    normalized = normalizer(classifier)
    classifier.network.eval()
    loaded = load_batches(bins, batches, device, threads)
    with closing(loaded), progress_bar(len(rows), "evaluate") as progress:
        for start, batch in zip(starts, loaded, strict=True):
            before_batch()
            with autocast(device):
                scores = classifier.logits(normalized(batch.images / 255))
            logits[start : start + len(scores)] = scores
            progress.update(len(scores))
    return logits


def evaluate(classifier: Classifier, bins: Bins, batch_size: int) -> Scores:
    """Score every bin once."""
    return scores_of(predict(classifier, bins, batch_size), bins, classifier.labels)


def scores_of(logits: Tensor, bins: Bins, labels: list[int]) -> Scores:
    """Of the logits [bins, labels] of all bins, in their order, on any device."""
    logits = logits.cpu()
    targets = class_numbers(bins, labels)
    return Scores(
        loss=cross_entropy(logits, targets).item(),
        accuracy=(logits.argmax(1) == targets).double().mean().item(),
        probabilities=logits.softmax(1).numpy(),
    )


def progress_bar(images: int, description: str) -> "tqdm[Never]":
    """On a terminal only, since a log has a line per epoch; of several processes, the first one's.

    torchrun numbers them in RANK.
    """
    return tqdm(
        total=images,
        desc=description,
        unit=" images",
        disable=None if os.environ.get("RANK", "0") == "0" else True,
        leave=False,
    )


def class_numbers(bins: Bins, labels: list[int]) -> Tensor:
    """Each bin's quantity as its place in `labels`, int64 [bins]. Raises UserError for others."""
    numbers = {label: number for number, label in enumerate(labels)}
    unknown = set(bins.quantities.tolist()) - set(labels)
    if unknown:
        raise UserError(f"the model knows the quantities {labels}, not {sorted(unknown)}")
    return torch.tensor([numbers[quantity] for quantity in bins.quantities.tolist()])
