"""Checks of training for benchmarks/gpu.py: it resumes after a stop, it says what to do when memory
is short, and it reaches some accuracy on real data."""

import re
import signal
import time
from dataclasses import astuple, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from benchmarks import common
from benchmarks.training import Task
from stages.networks.classifier import build_classifier
from stages.networks.inference import default_device, place
from stages.runtime.errors import Stopped, UserError
from stages.runtime.params import ModelParams
from stages.training.checkpoint import NAME, TrainingState, Watch, restore_checkpoint
from stages.training.engine import Trainer
from stages.training.processes import Processes


class _StoppingWatch(Watch):
    """Asks for a stop after the given step, as a signal would."""

    def __init__(self, processes: Processes, path: Path, epoch: int, step: int) -> None:
        super().__init__(processes, path)
        self._stop_at = epoch, step

    def after_step(self, state: TrainingState, images: int) -> None:
        if (state.epoch, state.step) == self._stop_at:
            self.request.signal = signal.SIGTERM
            self.look(state, images)
        super().after_step(state, images)


def compare_stopped_training(task: Task) -> list[str]:
    """Train without a stop, and with a stop in the middle of the last epoch.

    Returns a table row: the network, where it stopped, and whether both ended with the same bits.
    """
    straight, stopped, resumed = (task.trainer(deterministic=True) for _ in range(3))
    epochs = list(straight.train())
    epoch, step = task.settings.epochs, straight.steps // 2
    with TemporaryDirectory(prefix="bench-") as folder:
        path = Path(folder) / NAME
        try:
            list(stopped.train(_StoppingWatch(stopped.processes, path, epoch, step)))
        except Stopped:
            pass
        else:
            raise AssertionError("the training did not stop")
        if not restore_checkpoint(path, resumed.state, resumed.processes):
            raise AssertionError("the stopped training left no checkpoint")
    same = list(resumed.train()) == epochs
    different = differing_tensors(straight, resumed)
    found = "the same" if same and not different else f"{different} tensors differ"
    return [task.settings.name, f"epoch {epoch}, step {step} of {straight.steps}", found]


def differing_tensors(one: Trainer, other: Trainer) -> int:
    """How many tensors of the weights, their average and the optimizer differ."""
    states = (tree_leaves(trainer.state.state_dict()) for trainer in (one, other))
    return sum(
        not value.equal(other_value)
        for value, other_value in zip(*states, strict=True)
        if isinstance(value, torch.Tensor)
    )


def too_large_batch(task: Task, memory: int) -> str:
    """The message of a training whose batch does not fit into `memory` bytes of the GPU."""
    limit_memory(memory, task.device)
    trainer = task.trainer()
    try:
        trainer.train_one_epoch(Watch(trainer.processes))
    except UserError as error:
        return str(error)
    raise AssertionError("the batch was not too large")


def follow_advice(task: Task, memory: int, message: str) -> str:
    """Train as the message of too_large_batch advises, and say whether that works."""
    advice = re.search(r"accumulation to (\d+)", message)
    if not advice:
        return "It has no advice."
    limit_memory(memory, task.device)
    advised = replace(task, settings=common.changed(task.settings, accumulation=int(advice[1])))
    trainer = advised.trainer()
    try:
        trainer.train_one_epoch(Watch(trainer.processes))
    except UserError as error:
        return f"With this accumulation: {error}"
    return "With this accumulation it trained."


def limit_memory(memory: int, device: torch.device) -> None:
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(memory / total, device)


def accuracies(data: Path, model: str, settings: ModelParams, seconds: float) -> str:
    """Train on the pipeline's data folder, and return a table of the accuracies.

    No epoch begins after `seconds`. If the settings ask for pretrained weights, they are read from
    pretrained/<model> in that folder.
    """
    train_bins, validation_bins = common.load_data(data, "train", "validation")
    device = default_device()
    torch.manual_seed(settings.seed)
    labels = sorted({*train_bins.quantities.tolist(), *validation_bins.quantities.tolist()})
    classifier = build_classifier(settings, data / "pretrained" / model, labels, train_bins.size)
    place(classifier, device)
    batch_size = common.load_params()["evaluate"]["batch_size"]
    processes = Processes(device=device)
    trainer = Trainer(classifier, train_bins, validation_bins, settings, batch_size, processes)
    started, rows = time.monotonic(), []
    for epoch in trainer.train():
        passed = time.monotonic() - started
        row = [f"{value:.4f}" for value in astuple(epoch)[1:]]
        rows.append([str(epoch.epoch), *row, f"{passed:.1f}"])
        print(f"{model}: {' '.join(rows[-1])}", flush=True)
        if passed > seconds:
            break
    counts = np.unique(validation_bins.quantities, return_counts=True)[1]
    majority = counts.max() / len(validation_bins)
    header = ["epoch", "train loss", "accuracy", "validation loss", "accuracy", "after s"]
    return (
        f"{len(train_bins)} bins, validated on {len(validation_bins)}, whose most frequent quantity"
        f" is that of {majority:.4f} of them.\n\n{common.table(header, rows)}"
    )
