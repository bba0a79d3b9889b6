"""The optimizer and its learning rate."""

import math

from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from stages.networks.classifier import Classifier
from stages.runtime.params import ModelParams

OPTIMIZERS: dict[str, type[Adam]] = {"adam": Adam, "adamw": AdamW}


def make_optimizer(classifier: Classifier, params: ModelParams) -> Optimizer:
    """The optimizer of the parameters that are trained, in groups of one learning rate each.

    Weight decay leaves out biases and normalizations, as in transformers' Trainer. The learning
    rate of a group is `scale` times that of the step.
    """
    scales = learning_rate_scales(classifier, params)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in classifier.network.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((scales[name], parameter.ndim > 1), []).append(parameter)
    # Sorted, with the decayed ones first, so that a checkpoint finds the groups in the same order.
    return OPTIMIZERS[params.optimizer](
        [
            {
                "params": groups[scale, decayed],
                "weight_decay": params.weight_decay if decayed else 0.0,
                "scale": scale,
            }
            for scale, decayed in sorted(groups, reverse=True)
        ],
        lr=params.learning_rate,
        fused=True,
    )


def learning_rate_scales(classifier: Classifier, params: ModelParams) -> dict[str, float]:
    """What each parameter's learning rate is multiplied by: head_learning_rate and layer_decay.

    The decay is that of Bao et al., BEiT, 2021 (arXiv:2106.08254), appendix: 1 for what follows the
    last layer, and a factor of `layer_decay` for each layer before.
    """
    deepest = len(classifier.layers) + 1
    scales = {
        name: params.layer_decay ** (deepest - depth) for name, depth in classifier.depths.items()
    }
    if params.head_learning_rate is not None:
        of_head = {
            id(parameter) for layer in classifier.outputs for parameter in layer.parameters()
        }
        ratio = params.head_learning_rate / params.learning_rate
        named = classifier.network.named_parameters()
        scales |= {name: ratio for name, parameter in named if id(parameter) in of_head}
    return scales


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
        group["lr"] = rate * group["scale"]
