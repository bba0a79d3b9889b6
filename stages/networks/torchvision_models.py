"""Networks of torchvision. No other module imports torchvision."""

import shutil
from pathlib import Path
from typing import Any

import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from stages.formats.tables import write_json
from stages.networks.model_files import (
    CONFIG,
    WEIGHTS,
    load_fitting_weights,
    load_weights,
    read_json_object,
)
from stages.runtime.errors import UserError
from stages.runtime.params import ModelParams


def download(params: ModelParams, folder: Path) -> str:
    """Download the weights named `revision`, like IMAGENET1K_V1, as safetensors."""
    try:
        weights = torchvision.models.get_model_weights(params.name)[params.revision]
    except (KeyError, ValueError):
        raise UserError(
            f"torchvision has no weights {params.revision} of {params.name}: check this model's"
            " name and revision in params.yaml"
        ) from None
    url: str = weights.url
    # Not in torch's own cache, because files that are already there are not checked.
    downloads = folder / ".download"
    try:
        # check_hash compares the file with the start of a SHA-256 in its name.
        state = weights.get_state_dict(model_dir=downloads, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{url} could not be downloaded: {error}") from None
    save_file(state, folder / WEIGHTS)
    shutil.rmtree(downloads)
    write_json(folder / CONFIG, _config(params.name, len(weights.meta["categories"]), {}))
    return url


def build(params: ModelParams, pretrained: Path, labels: list[int], size: int) -> nn.Module:  # noqa: ARG001 - its networks take images of any size
    network = _network(params.name, labels, params.config)
    if params.pretrained:
        load_fitting_weights(network, load_file(pretrained / WEIGHTS), labels)
    return network


def save(network: nn.Module, params: ModelParams, labels: list[int], folder: Path) -> None:
    """Write the weights as the state dict of torchvision.models.get_model(name, **config)."""
    save_file(network.state_dict(), folder / WEIGHTS)
    names = {str(number): str(label) for number, label in enumerate(labels)}
    config = _config(params.name, len(labels), params.config)
    write_json(folder / CONFIG, config | {"id2label": names})


def load(folder: Path, labels: list[int]) -> nn.Module:
    config = read_json_object(folder / CONFIG)
    network = _network(config["name"], labels, config["config"])
    load_weights(network, load_file(folder / WEIGHTS))
    return network


def _network(name: str, labels: list[int], config: dict[str, Any]) -> nn.Module:
    # Other networks, like detectors, would download weights for their backbones.
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"torchvision has no classifier {name}")
    network: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=len(labels), **config
    )
    return network


def _config(name: str, classes: int, config: dict[str, Any]) -> dict[str, Any]:
    return {"library": "torchvision", "name": name, "num_classes": classes, "config": config}
