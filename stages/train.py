"""Train one model: models/<model> and reports/<model>/curves.csv.

A killed run goes on from its last checkpoint. `torchrun --nproc-per-node N -m stages.train <model>`
trains with N processes a machine, on one machine or several.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from stages.formats.tables import write_csv
from stages.imaging.loader import load_sets
from stages.networks.classifier import build_classifier, save_classifier
from stages.networks.inference import place
from stages.runtime import paths
from stages.runtime.command import run_stage
from stages.runtime.errors import UserError
from stages.runtime.files import digest, digest_files
from stages.runtime.params import Params, load_params
from stages.runtime.space import require_space
from stages.runtime.work import publish_folder, unfinished
from stages.training import checkpoint
from stages.training.checkpoint import StopRequest, Watch, restore_checkpoint, stop_requests
from stages.training.engine import Epoch, Trainer
from stages.training.launch import process_count, run_processes
from stages.training.processes import Processes, joined_processes


def main(model: str) -> str:
    params = load_params()
    params.model(model)
    return run_processes(process_count(params.run.processes), train_model, model)


def train_model(model: str) -> str:
    """The work of each process; only the first one writes."""
    params = load_params()
    with (
        joined_processes() as processes,
        folder_of_work(params, model, processes) as work,
    ):
        # A killed run's takes space, and may be linked into DVC's cache, where nothing may be
        # overwritten.
        if processes.is_first:
            shutil.rmtree(work / "model", ignore_errors=True)
        with stop_requests() as request:
            trainer, epochs = train(params, model, work, processes, request)
        if processes.is_first:
            save_classifier(trainer.trained, trainer.knobs, work / "model")
            publish_folder(work / "model", paths.MODELS / model)
            write_csv(paths.REPORTS / model / "curves.csv", pd.DataFrame(map(asdict, epochs)))
    return f"{len(trainer.train_bins)} bins, {len(epochs)} epochs"


@contextmanager
def folder_of_work(params: Params, model: str, processes: Processes) -> Iterator[Path]:
    """The first process's folder; one of the same name where a machine has a disk of its own.

    Raises UserError on a machine with other inputs than the first one's.
    """
    first_of_machine = processes.local_rank == 0
    key = inputs_digest(params, model) if first_of_machine else ""
    if processes.agree(key) != key and first_of_machine:
        raise UserError(
            f"{paths.RESIZED}, {paths.SPLIT} or {paths.PRETRAINED / model} of this machine are not"
            " those of the first one: `dvc pull` them on each"
        )
    with ExitStack() as stack:
        if processes.is_first:
            folder = stack.enter_context(unfinished(f"train-{model}", key))
            processes.agree(str(folder))
        else:
            folder = Path(processes.agree(""))
            # The lock that the first process holds is not on this disk.
            if first_of_machine and not folder.with_suffix(".lock").exists():
                folder.mkdir(parents=True, exist_ok=True)
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def train(
    params: Params, model: str, work: Path, processes: Processes, request: StopRequest
) -> tuple[Trainer, list[Epoch]]:
    """Train, from the last checkpoint in the folder `work` if it has one."""
    knobs = params.model(model)
    names = ["train", "validation", "test"]
    sets = load_sets(paths.RESIZED, paths.SPLIT, names, work, processes)
    train_bins, validation_bins, test_bins = sets
    labels = sorted({quantity for bins in sets for quantity in bins.quantities.tolist()})
    torch.manual_seed(knobs.seed)
    classifier = build_classifier(knobs, paths.PRETRAINED / model, labels, train_bins.size)
    place(classifier, processes.device, deterministic=params.run.deterministic)
    batch_size = params.evaluate.batch_size
    trainer = Trainer(
        classifier, train_bins, validation_bins, test_bins, knobs, batch_size, processes
    )
    path = work / checkpoint.NAME
    if processes.is_first:
        # The last checkpoint of a killed run has its space already.
        there = path.stat().st_size if path.exists() else 0
        require_space(work, space_to_train(trainer) - there, f"{model} and its checkpoints")
    resumed = restore_checkpoint(path, trainer.state, processes)
    watch = Watch(processes, path, 60 * params.run.checkpoint_minutes, request)
    if processes.is_first:
        report_start(model, trainer, resumed=resumed)
    started = time.monotonic()
    epochs = []
    for epoch in trainer.train(watch):
        epochs.append(epoch)
        if processes.is_first:
            report_epoch(model, epoch, knobs.epochs, time.monotonic() - started)
    return trainer, epochs


def space_to_train(trainer: Trainer) -> int:
    """Bytes of a checkpoint, of the next one beside it, and of the model."""
    weights: int = sum(value.nbytes for value in trainer.classifier.network.state_dict().values())
    # The optimizer has two moments of each weight, and there may be their moving average.
    copies = 4 if trainer.knobs.ema_decay else 3
    return (2 * copies + 1) * weights


def inputs_digest(params: Params, model: str) -> str:
    """All that the trained weights depend on, but for the project's code and rounding."""
    inputs = [
        *sorted(paths.RESIZED.iterdir()),
        paths.SPLIT,
        *sorted((paths.PRETRAINED / model).iterdir()),
    ]
    knobs, deterministic = params.model(model), params.run.deterministic
    return digest(knobs, deterministic, torch.__version__, digest_files(inputs))


def report_start(model: str, trainer: Trainer, *, resumed: bool) -> None:
    state, knobs, steps = trainer.state, trainer.knobs, trainer.steps
    print(
        f"{model}: {len(trainer.train_bins)} bins on {trainer.processes.size} x"
        f" {trainer.classifier.device.type}, {knobs.epochs} epochs of {steps} steps",
        flush=True,
    )
    if resumed:
        print(f"{model}: going on after epoch {state.epoch}, step {state.step}", flush=True)
    if knobs.warmup_steps >= knobs.epochs * steps:
        print(
            f"{model}: warning: train.{model}.warmup_steps ({knobs.warmup_steps}) are all of the"
            f" {knobs.epochs * steps} steps: the learning rate stays below its value",
            flush=True,
        )


def report_epoch(model: str, epoch: Epoch, epochs: int, seconds: float) -> None:
    print(
        f"{model} epoch {epoch.epoch}/{epochs}:"
        f" train loss {epoch.train_loss:.3f} accuracy {epoch.train_accuracy:.3f},"
        f" validation loss {epoch.validation_loss:.3f} accuracy {epoch.validation_accuracy:.3f},"
        f" test loss {epoch.test_loss:.3f} accuracy {epoch.test_accuracy:.3f},"
        f" after {seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    run_stage("train", main, model="a key of params.yaml's train block")
