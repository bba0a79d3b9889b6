"""Train one model: models/<model> and reports/<model>/curves.csv."""

import time
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from stages.core.command import run_stage
from stages.core.engine import Epoch, place, train
from stages.core.files import digest, publish_folder, unfinished, write_csv
from stages.core.loader import load_bins
from stages.core.networks import build_classifier, save_classifier
from stages.core.params import load_params

RESIZED = Path("data/resized")
SPLIT = Path("data/split.csv")
PRETRAINED = Path("models/pretrained")
MODELS = Path("models")
REPORTS = Path("reports")


def main(model: str) -> str:
    knobs = load_params().model(model)
    train_bins, test_bins = (load_bins(RESIZED, SPLIT, name) for name in ("train", "test"))
    labels = sorted({*train_bins.quantities.tolist(), *test_bins.quantities.tolist()})
    torch.manual_seed(knobs.seed)
    classifier = build_classifier(knobs, PRETRAINED / model, labels, train_bins.size)
    place(classifier)
    epochs: list[Epoch] = []
    started = time.monotonic()
    for epoch in train(classifier, train_bins, test_bins, knobs):
        epochs.append(epoch)
        print(
            f"{model} epoch {epoch.epoch}/{knobs.epochs}:"
            f" train loss {epoch.train_loss:.3f} accuracy {epoch.train_accuracy:.3f},"
            f" test loss {epoch.test_loss:.3f} accuracy {epoch.test_accuracy:.3f},"
            f" after {time.monotonic() - started:.0f} s",
            flush=True,
        )
    with unfinished(f"train-{model}", digest(knobs)) as folder:
        save_classifier(classifier, knobs, folder)
        publish_folder(folder, MODELS / model)
    write_csv(REPORTS / model / "curves.csv", pd.DataFrame(map(asdict, epochs)))
    return f"{len(train_bins)} bins, {knobs.epochs} epochs in {time.monotonic() - started:.0f} s"


if __name__ == "__main__":
    run_stage("train", main, model="a key of params.yaml's train block")
