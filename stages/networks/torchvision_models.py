"""Networks of torchvision. The only module that imports it."""

import shutil
from pathlib import Path
from typing import Any

import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.formats.tables import write_json
from stages.networks.model_files import CONFIG, WEIGHTS, read_json, refuse_random_layers
from stages.runtime.errors import UserError
from stages.runtime.params import ModelParams


def download(model: ModelParams, folder: Path) -> str:
    """The weights that `revision` names, like IMAGENET1K_V1, converted to safetensors."""
    try:
        weights = torchvision.models.get_model_weights(model.name)[model.revision]
    except (KeyError, ValueError):
        raise UserError(
            f"torchvision has no weights {model.revision} of {model.name}: check this model's name"
            " and revision in params.yaml"
        ) from None
    url: str = weights.url
    # Not torch's own cache, in which nothing checks the files again.
    downloads = folder / ".download"
    try:
        # The file's name holds the start of its SHA-256, which check_hash compares.
        state = weights.get_state_dict(model_dir=downloads, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{url} could not be downloaded: {error}") from None
    save_file(state, folder / WEIGHTS)
    shutil.rmtree(downloads)
    write_json(folder / CONFIG, _config(model.name, len(weights.meta["categories"]), {}))
    return url


def build(model: ModelParams, pretrained: Path, labels: list[int], size: int) -> nn.Module:  # noqa: ARG001 - they take images of any size
    network = _network(model.name, labels, model.config)
    if model.pretrained:
        own = network.state_dict()
        weights = {
            name: weight
            for name, weight in load_file(pretrained / WEIGHTS).items()
            if name in own and own[name].shape == weight.shape
        }
        refuse_random_layers(own.keys() - weights.keys(), network, labels)
        _load_weights(network, own | weights)
    return network


def save(network: nn.Module, model: ModelParams, labels: list[int], folder: Path) -> None:
    """The weights are the state dict of torchvision.models.get_model(name, **config)."""
    save_file(network.state_dict(), folder / WEIGHTS)
    names = {str(number): str(label) for number, label in enumerate(labels)}
    config = _config(model.name, len(labels), model.config)
    write_json(folder / CONFIG, config | {"id2label": names})


def load(folder: Path, labels: list[int]) -> nn.Module:
    config = read_json(folder / CONFIG)
    network = _network(config["name"], labels, config["config"])
    _load_weights(network, load_file(folder / WEIGHTS))
    return network


def _network(name: str, labels: list[int], config: dict[str, Any]) -> nn.Module:
    # Builders of other networks, like detectors, download the weights of their backbones.
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"it has no classifier {name}")
    network: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=len(labels), **config
    )
    return network


def _load_weights(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Strictly, and marked with the versions of the network's layers, which safetensors lacks.

    Without a version, MNASNet takes them for those of its first one, and changes its layers.
    """
    state = network.state_dict()
    state.clear()
    state.update(weights)
    network.load_state_dict(state)


def _config(name: str, classes: int, config: dict[str, Any]) -> dict[str, Any]:
    return {"library": "torchvision", "name": name, "num_classes": classes, "config": config}
