"""Using a classifier: its device and precision, normalized images, and the scores of bins."""

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate
from tqdm import tqdm

from stages.imaging.loader import Bins, load_batches
from stages.networks.calibration import positions_of
from stages.networks.classifier import Classifier
from stages.runtime.params import Precision


@dataclass(frozen=True)
class Scores:
    """The result of an evaluation: mean loss, accuracy, and probabilities [bins, labels]."""

    loss: float
    accuracy: float
    probabilities: NDArray[np.float32]


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def place(classifier: Classifier, device: torch.device, *, deterministic: bool = False) -> None:
    """Move the network to a device, in the fastest memory format.

    `deterministic` makes a GPU compute the same bits each time, at a cost. A CPU always does.
    """
    if device.type == "cuda":
        if deterministic:
            # cuBLAS reads this when it starts. Without it, torch refuses to multiply matrices.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = not deterministic
        # By default, convolutions of float32 numbers use 10 bits of their fractions.
        torch.backends.cudnn.allow_tf32 = classifier.precision != "float32"
        torch.use_deterministic_algorithms(deterministic)
    classifier.network.to(device).to(memory_format=torch.channels_last)


def autocast(device: torch.device, precision: Precision = "auto") -> torch.autocast:
    """Autocast to bfloat16: if the hardware supports it, since emulation is slow, or if wanted."""
    if precision != "auto":
        capable = precision == "bfloat16"
    elif device.type == "cuda":
        capable = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        capable = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=capable)


def normalizer(classifier: Classifier) -> Callable[[Tensor], Tensor]:
    """A function that makes the network's input of images with values from 0 to 1, on its device.

    It scales them to the network's size, and normalizes them. Make it once, because copying its
    constants to a GPU waits for the GPU.
    """
    mean = torch.tensor(classifier.mean, device=classifier.device)
    std = torch.tensor(classifier.std, device=classifier.device)
    return lambda images: normalize(scale(images, classifier.size), mean, std)


def scale(images: Tensor, size: int) -> Tensor:
    """Scale images [batch, 3, height, width] to `size` pixels in both directions."""
    if images.shape[-2:] == (size, size):
        return images
    return interpolate(images, (size, size), mode="bilinear", antialias=True)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalize images with values from 0 to 1 by the mean [3] and deviation [3] per channel."""
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

    They are float32 even if autocast computes in bfloat16. `before_batch` is called before each
    batch is scored. `threads` is the number of decoding threads, by default one per core.
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
            with autocast(device, classifier.precision):
                scores = classifier.logits(normalized(batch.images / 255))
            logits[start : start + len(scores)] = scores
            progress.update(len(scores))
    return logits


def evaluate(classifier: Classifier, bins: Bins, batch_size: int) -> Scores:
    """Score every bin once."""
    return scores_of(predict(classifier, bins, batch_size), bins, classifier.labels)


def scores_of(logits: Tensor, bins: Bins, labels: list[int]) -> Scores:
    """The scores for logits [bins, labels] of all bins, in their order, on any device."""
    logits = logits.cpu()
    targets = torch.from_numpy(positions_of(bins.quantities, labels))
    return Scores(
        loss=cross_entropy(logits, targets).item(),
        accuracy=(logits.argmax(1) == targets).double().mean().item(),
        probabilities=logits.softmax(1).numpy(),
    )


def progress_bar(images: int, description: str) -> "tqdm[Never]":
    """A progress bar, shown by the first process only, and only on a terminal.

    In a log file, the line after each epoch is enough. RANK is torchrun's number of the process.
    """
    return tqdm(
        total=images,
        desc=description,
        unit=" images",
        disable=None if os.environ.get("RANK", "0") == "0" else True,
        leave=False,
    )
