"""Training the same network on the same images, with this project's engine and without it.

Each way of training is a function that trains until its stopwatch has timed enough steps. All start
with the same weights, flip half of the images, and use AdamW without weight decay.
"""

import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks import common
from stages.imaging.loader import load_batches
from stages.networks.classifier import Classifier, build_classifier, logits_of
from stages.networks.inference import place
from stages.runtime.params import ModelParams
from stages.training.checkpoint import TrainingState, Watch
from stages.training.engine import Trainer
from stages.training.epochs import plan_epoch
from stages.training.processes import Processes

TINY = "tiny network"
# No weights are read, since networks start with random ones.
NO_WEIGHTS = Path("none")


class EnoughError(Exception):
    """The stopwatch has timed enough steps."""


@dataclass
class Stopwatch:
    """Times steps from the end of the `skip`-th one until `seconds` have passed.

    It waits for a GPU only at both ends. `peak` is the most GPU memory in use between them.
    """

    device: torch.device
    skip: int
    seconds: float
    steps: int = 0
    elapsed: float = 0.0
    peak: int = 0
    _created: float = field(default_factory=time.perf_counter)
    _started: float = 0.0

    def step(self) -> bool:
        """Count a finished step. Returns whether enough have been timed."""
        self.steps += 1
        if self.steps == self.skip:
            self._wait()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            self._started = time.perf_counter()
        elif self.steps > self.skip and time.perf_counter() - self._started > self.seconds:
            self._wait()
            self.elapsed = time.perf_counter() - self._started
            if self.device.type == "cuda":
                self.peak = torch.cuda.max_memory_allocated(self.device)
            return True
        return False

    @property
    def seconds_a_step(self) -> float:
        if not self.elapsed:
            raise RuntimeError(f"the images ended after {self.steps} steps, too few to be timed")
        return self.elapsed / (self.steps - self.skip)

    @property
    def seconds_before(self) -> float:
        """From the creation of the stopwatch to the first timed step: starting and compiling."""
        return self._started - self._created

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Task:
    """A model of params.yaml, or the tiny one, and the data to train it on.

    An epoch has `images` images: those of synthetic_data in `folder`, repeated.
    """

    model: str
    settings: ModelParams
    folder: Path
    size: int
    images: int
    device: torch.device

    def classifier(self) -> Classifier:
        """A classifier with the same random weights each time."""
        torch.manual_seed(self.settings.seed)
        labels = common.load_params()["subset"]["quantities"]
        if self.model == TINY:
            network = tiny_network(len(labels))
            return Classifier(network, labels, self.size, self.settings.mean, self.settings.std)
        return build_classifier(self.settings, NO_WEIGHTS, labels, self.size)

    def trainer(self, *, deterministic: bool = False, kind: type[Trainer] = Trainer) -> Trainer:
        (bins,) = common.load_data(self.folder, "train")
        bins = common.repeated(bins, self.images)
        classifier = self.classifier()
        place(classifier, self.device, deterministic=deterministic)
        processes = Processes(device=self.device)
        return kind(classifier, bins, bins, self.settings, 64, processes)


def comparable_settings(model: str, **changes: Any) -> ModelParams:
    """The model's params, except for settings that all ways of training have in common."""
    common_to_all = {"pretrained": False, "optimizer": "adamw", "weight_decay": 0.0}
    return common.model_params(model, **common_to_all | changes)


def tiny_network(labels: int) -> nn.Module:
    """A network that computes next to nothing, so that a step consists of overhead."""
    layers = [nn.Conv2d(3, 4, 8, stride=8), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, labels))


class _TimedWatch(Watch):
    """Ends the training when the stopwatch has timed enough steps."""

    def __init__(self, processes: Processes, stopwatch: Stopwatch) -> None:
        super().__init__(processes)
        self._stopwatch = stopwatch

    def after_step(self, state: TrainingState, images: int) -> None:
        super().after_step(state, images)
        if self._stopwatch.step():
            raise EnoughError


def train_ours(task: Task, stopwatch: Stopwatch) -> Trainer:
    """This project's engine with its loader. Returns the trainer, for more measurements."""
    trainer = task.trainer()
    with suppress(EnoughError):
        trainer.train_one_epoch(_TimedWatch(trainer.processes, stopwatch))
    return trainer


def train_on_one_batch(task: Task, stopwatch: Stopwatch) -> None:
    """The engine's steps without its loader: the same batch on the device in each step."""
    repeat_one_batch(task.trainer(), stopwatch)


def repeat_one_batch(trainer: Trainer, stopwatch: Stopwatch) -> None:
    """The same, with a trainer that has been compiled already."""
    step = step_on_one_batch(trainer)
    while not stopwatch.step():
        step()


def step_on_one_batch(trainer: Trainer) -> Callable[[], None]:
    """Start an epoch. The function returned takes its next step, always with the same images."""
    bins, classifier, settings = trainer.train_bins, trainer.classifier, trainer.params
    plan = plan_epoch(bins, classifier, settings, trainer.processes, epoch=1)
    (batch,) = load_batches(bins, [plan.rows(slice(settings.batch_size))], classifier.device)
    images = itertools.repeat(batch.images)
    trainer.state.start_epoch(1)
    trainer.module.train()
    return lambda: trainer.train_step(plan, images)


class _Rows(Dataset[dict[str, Any]]):
    """The images of a task in the form that transformers' Trainer expects."""

    def __init__(self, task: Task) -> None:
        self._files = image_files(task)
        self._count = task.images

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> dict[str, Any]:
        image, label = self._files[row % len(self._files)]
        return {"pixel_values": image, "labels": label}


class _RowsInMemory(Dataset[dict[str, Any]]):
    """The same image in each row, so that nothing has to be loaded."""

    def __init__(self, task: Task) -> None:
        self._image = torch.zeros(3, task.size, task.size)
        self._count = task.images

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"pixel_values": self._image, "labels": 0}


def image_files(task: Task) -> ImageFolder:
    """Images prepared as in torchvision's reference training; they have the right size already."""
    transform = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(task.settings.mean, task.settings.std),
        ]
    )
    return ImageFolder(str(task.folder / "files"), transform)


class _WithLoss(nn.Module):
    """A torchvision network in the form that transformers' Trainer expects."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class _TimedCallback(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch

    def on_step_end(self, _arguments: Any, _state: Any, control: Any, **_kwargs: Any) -> None:
        control.should_training_stop = self._stopwatch.step()


def train_with_hugging_face(task: Task, stopwatch: Stopwatch, workers: int = 0) -> None:
    """transformers' Trainer with its defaults, except bf16 on a GPU and the loader's workers."""
    _train_with_hugging_face(task, stopwatch, workers, _Rows(task))


def train_with_hugging_face_from_memory(task: Task, stopwatch: Stopwatch) -> None:
    _train_with_hugging_face(task, stopwatch, 0, _RowsInMemory(task))


def _train_with_hugging_face(
    task: Task, stopwatch: Stopwatch, workers: int, rows: Dataset[dict[str, Any]]
) -> None:
    network = task.classifier().network
    if not isinstance(network, transformers.PreTrainedModel):
        network = _WithLoss(network)
    with TemporaryDirectory(prefix="bench-") as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=task.settings.batch_size,
            learning_rate=task.settings.learning_rate,
            num_train_epochs=1,
            bf16=task.device.type == "cuda",
            use_cpu=task.device.type == "cpu",
            dataloader_num_workers=workers,
            # No files and no output, since the others write none either.
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        callbacks = [_TimedCallback(stopwatch)]
        trainer = transformers.Trainer(network, arguments, train_dataset=rows, callbacks=callbacks)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


def train_like_torchvision(task: Task, stopwatch: Stopwatch, workers: int = 0) -> None:
    """The loop of torchvision's reference training: float32, with metrics read in every step."""
    network = task.classifier().network.to(task.device).train()
    optimizer = _adamw(task, network)
    loader = DataLoader(_Rows(task), task.settings.batch_size, shuffle=True, num_workers=workers)
    for batch in loader:
        images, targets = batch["pixel_values"].to(task.device), batch["labels"].to(task.device)
        logits = logits_of(network(images))
        loss = cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        # Its log shows these.
        _metrics = loss.item(), (logits.argmax(1) == targets).sum().item()
        if stopwatch.step():
            break


def train_bare(task: Task, stopwatch: Stopwatch) -> None:
    """The least work that a step can do: one batch in memory, and no metrics."""
    network = task.classifier().network.to(task.device).train()
    optimizer = _adamw(task, network)
    batch_size = task.settings.batch_size
    images = torch.zeros(batch_size, 3, task.size, task.size, device=task.device)
    targets = torch.zeros(batch_size, dtype=torch.int64, device=task.device)
    while not stopwatch.step():
        cross_entropy(logits_of(network(images)), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def _adamw(task: Task, network: nn.Module) -> torch.optim.Optimizer:
    rate = task.settings.learning_rate
    return torch.optim.AdamW(network.parameters(), rate, weight_decay=task.settings.weight_decay)
