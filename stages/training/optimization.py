"""The optimizer and its learning rate."""

import math

from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from stages.runtime.params import ModelParams

OPTIMIZERS: dict[str, type[Adam]] = {"adam": Adam, "adamw": AdamW}


def make_optimizer(network: nn.Module, params: ModelParams) -> Optimizer:
    """Weight decay leaves out biases and normalizations, as in transformers' Trainer."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": params.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[params.optimizer](groups, lr=params.learning_rate, fused=True)


def learning_rate(params: ModelParams, step: int, steps: int) -> float:
    """The rate at a step: warm-up from 0, then constant, or down to 0 linearly or by a cosine."""
    if step < params.warmup_steps:
        return params.learning_rate * step / params.warmup_steps
    progress = min(1.0, (step - params.warmup_steps) / max(1, steps - params.warmup_steps))
    factors = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": (1.0 + math.cos(math.pi * progress)) / 2,
    }
    return params.learning_rate * factors[params.schedule]


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
