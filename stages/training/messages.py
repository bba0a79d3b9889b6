"""The messages of a training: a line at its start, and one after each epoch."""

import torch
from torch import nn

from stages.training.compilation import NEEDS
from stages.training.engine import Epoch, Trainer


def report_start(model: str, trainer: Trainer, *, resumed: bool) -> None:
    state, params, steps = trainer.state, trainer.params, trainer.steps
    device = trainer.classifier.device.type
    if device == "cpu":
        # Another number of threads gives other bytes.
        device = f"cpu (threads: {torch.get_num_threads()})"
    print(
        f"{model}: {len(trainer.train_bins)} bins on {trainer.processes.size} x {device},"
        f" {params.epochs} epochs of {steps} steps",
        flush=True,
    )
    if params.freeze or params.freeze_backbone:
        trained, weights = count_weights(trainer.classifier.network)
        text = f"{model}: {trained:,} of {weights:,} weights are trained, the others are frozen"
        if not params.freeze_backbone:
            text += f", up to {trainer.classifier.layers[params.freeze - 1]}"
        print(text, flush=True)
    if resumed:
        print(f"{model}: continuing after epoch {state.epoch}, step {state.step}", flush=True)
    if trainer.compiling_problem:
        print(
            f"{model}: warning: training is slower without torch.compile, which fails on this"
            f" machine ({trainer.compiling_problem}): {NEEDS}",
            flush=True,
        )
    if params.warmup_steps >= params.epochs * steps:
        print(
            f"{model}: warning: train.{model}.warmup_steps ({params.warmup_steps}) covers all"
            f" {params.epochs * steps} steps: the learning rate never reaches learning_rate",
            flush=True,
        )


def count_weights(network: nn.Module) -> tuple[int, int]:
    """How many weights are trained, and how many there are."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def report_epoch(model: str, epoch: Epoch, epochs: int, seconds: float) -> None:
    print(
        f"{model} epoch {epoch.epoch}/{epochs}:"
        f" train loss {epoch.train_loss:.3f} accuracy {epoch.train_accuracy:.3f},"
        f" validation loss {epoch.validation_loss:.3f} accuracy {epoch.validation_accuracy:.3f},"
        f" after {seconds:.0f} s",
        flush=True,
    )
