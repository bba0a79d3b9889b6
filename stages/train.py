"""Train one model on train, and calibrate it on validation. The test set is not read.

Writes models/<model>, with everything needed to use the model, and reports/<model>/curves.csv. A
killed run continues from its last checkpoint. `torchrun --nproc-per-node N -m stages.train <model>`
trains with N processes on each of its machines.
"""

import shutil
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from stages.formats.tables import read_csv, write_csv
from stages.networks.classifier import build_classifier
from stages.networks.inference import Scores, place
from stages.networks.release import save_release
from stages.runtime import paths
from stages.runtime.command import run_stage
from stages.runtime.files import digest, digest_files
from stages.runtime.params import Params, load_params
from stages.runtime.work import publish_folder
from stages.training import checkpoint
from stages.training.checkpoint import Watch, restore_checkpoint, stop_requests
from stages.training.engine import Epoch, Trainer
from stages.training.launch import process_count, run_processes
from stages.training.machines import folder_of_work, share_bins
from stages.training.messages import report_epoch, report_start
from stages.training.processes import Processes, joined_processes


def main(model: str) -> str:
    params = load_params()
    params.model(model)
    return run_processes(process_count(params.run.processes), train_model, model)


def train_model(model: str) -> str:
    """Train as one of the processes; only the first one writes the results."""
    params = load_params()
    with (
        joined_processes() as processes,
        folder_of_work(f"train-{model}", partial(inputs_of, params, model), processes) as work,
        stop_requests() as request,
    ):
        trainer = make_trainer(params, model, work, processes)
        path = work / checkpoint.NAME
        resumed = restore_checkpoint(path, trainer.state, processes)
        if processes.is_first:
            report_start(model, trainer, resumed=resumed)
        watch = Watch(processes, path, 60 * params.run.checkpoint_minutes, request)
        epochs = train(model, trainer, watch)
        scores = trainer.score_validation(watch)
        if processes.is_first:
            publish(params, model, trainer, scores, work / "model")
            write_csv(paths.REPORTS / model / "curves.csv", pd.DataFrame(map(asdict, epochs)))
    bins, kept = len(trainer.train_bins), trainer.kept_epoch
    return f"{bins} bins, {len(epochs)} epochs; the weights of epoch {kept} are kept"


def inputs_of(params: Params, model: str) -> str:
    """A digest of everything that the outputs depend on, except the code and rounding."""
    files = [
        *sorted(paths.RESIZED.iterdir()),
        paths.SPLIT,
        *sorted((paths.PRETRAINED / model).iterdir()),
    ]
    settings = params.model(model), params.resize, params.subset.quantities
    return digest(settings, params.run.deterministic, torch.__version__, digest_files(files))


def make_trainer(params: Params, model: str, work: Path, processes: Processes) -> Trainer:
    model_params, pixels = params.model(model), params.resize.size
    names = ["train", "validation"]
    train_bins, validation_bins = share_bins(
        paths.RESIZED, paths.SPLIT, names, pixels, work, processes
    )
    labels = params.subset.quantities
    torch.manual_seed(model_params.seed)
    size = model_params.image_size or pixels
    classifier = build_classifier(model_params, paths.PRETRAINED / model, labels, size)
    place(classifier, processes.device, deterministic=params.run.deterministic)
    batch_size = params.evaluate.batch_size
    return Trainer(classifier, train_bins, validation_bins, model_params, batch_size, processes)


def train(model: str, trainer: Trainer, watch: Watch) -> list[Epoch]:
    started = time.monotonic()
    epochs = []
    for epoch in trainer.train(watch):
        epochs.append(epoch)
        if trainer.processes.is_first:
            report_epoch(model, epoch, trainer.params.epochs, time.monotonic() - started)
    return epochs


def publish(params: Params, model: str, trainer: Trainer, scores: Scores, folder: Path) -> None:
    """Write the model to `folder`, then publish it as models/<model>. `scores` are validation's."""
    # DVC's cache may have links to files of a killed run, which must not be overwritten.
    shutil.rmtree(folder, ignore_errors=True)
    ids, actual = trainer.validation_bins.ids, trainer.validation_bins.quantities
    groups = read_csv(paths.SPLIT).set_index("id")["group"][ids]
    save_release(
        folder,
        trainer.trained,
        trainer.params,
        params.resize,
        pd.DataFrame({"id": ids, "group": groups.to_numpy(), "actual": actual}),
        scores.probabilities.astype(np.float64),
        epoch=trainer.kept_epoch,
    )
    publish_folder(folder, paths.MODELS / model)


if __name__ == "__main__":
    run_stage("train", main, model="a key of params.yaml's train block")
