"""Networks of timm, an optional package. No other module imports it."""

import inspect
import logging
from pathlib import Path
from typing import Any

import timm
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from timm.layers import convert_sync_batchnorm
from torch import nn

from stages.formats.tables import write_json
from stages.networks import hub
from stages.networks.model_files import (
    CONFIG,
    WEIGHTS,
    load_fitting_weights,
    read_json_object,
    refuse_random_layers,
)
from stages.runtime.params import ModelParams

# This module checks itself which layers start at random.
logging.getLogger("timm").setLevel(logging.ERROR)

# Arguments of timm that say what is built and loaded, not how it is built: weights from elsewhere,
# pickles, weights that need not fit.
_OURS = set(inspect.signature(timm.create_model).parameters) | {"num_classes", "pretrained_strict"}
# Families whose weights timm loads even if some are missing. It checks those of all others.
_LENIENT = ("dla", "mobilenetv5")


def download(params: ModelParams, folder: Path) -> str:
    """Download the hub's repository timm/<name> at `revision`."""
    return hub.download_model(f"timm/{params.name}", params.revision, folder)


def build(params: ModelParams, pretrained: Path, labels: list[int], size: int) -> nn.Module:
    if not params.pretrained:
        return _network(params.name, params.config, len(labels), size)
    source = _with_weights(params, pretrained / WEIGHTS, size)
    # As `load` will build it, which is not always what reset_classifier would make of the source.
    network = _network(params.name, params.config, len(labels), size)
    load_fitting_weights(network, source.state_dict(), labels)
    return network


def _with_weights(params: ModelParams, weights: Path, size: int) -> nn.Module:
    """The network with these weights, and with as many classes as they have.

    In this case timm refuses weights of which some are missing.
    """
    network = _network(params.name, params.config, _classes_of(weights, params.name), size, weights)
    if params.name.startswith(_LENIENT):
        with safe_open(weights, framework="pt") as file:
            refuse_random_layers(network.state_dict().keys() - file.keys(), network, [])
    return network


def save(network: nn.Module, params: ModelParams, labels: list[int], folder: Path) -> None:
    """Write the weights as the state dict of timm.create_model(name, **config).

    The size of the images, in config.json, is the argument img_size of networks that take one.
    """
    # Some networks have two names for one weight, which is written once.
    save_model(network, str(folder / WEIGHTS))
    made: Any = network
    config = {
        "library": "timm",
        "name": params.name,
        "num_classes": len(labels),
        "input_size": made.pretrained_cfg["input_size"],
        "config": params.config,
        "id2label": {str(number): str(label) for number, label in enumerate(labels)},
    }
    write_json(folder / CONFIG, config)


def load(folder: Path, labels: list[int]) -> nn.Module:
    config = read_json_object(folder / CONFIG)
    size = config["input_size"][-1]
    network = _network(config["name"], config["config"], len(labels), size)
    load_model(network, folder / WEIGHTS)
    return network


def synchronize_batch_norm(network: nn.Module) -> None:
    """Let batch normalization use the images of all processes.

    timm has layers that normalize and activate. torch's own function would make them normalize
    only.
    """
    convert_sync_batchnorm(network)


def _network(
    name: str, config: dict[str, Any], classes: int, size: int, weights: Path | None = None
) -> nn.Module:
    """The network for images of `size` pixels, with the weights of a safetensors file, if given.

    timm fits the weights to the size: it interpolates position embeddings, for example.
    """
    # A name may also be a repository of the hub, whose configuration would be downloaded.
    if not timm.is_model(name):
        raise ValueError(f"timm has no network {name}")
    if refused := sorted(_OURS & config.keys()):
        raise ValueError(f"its config has no key {', '.join(refused)} that can be set")
    fixed = timm.models.get_pretrained_cfg(name).fixed_input_size
    sizes = {"img_size": size} if fixed else {}
    source = {"input_size": (3, size, size), "num_classes": classes, "label_offset": None}
    if weights is not None:
        source |= {"file": str(weights), "custom_load": False}
    network: nn.Module = timm.create_model(
        name,
        pretrained=weights is not None,
        pretrained_cfg_overlay=source,
        num_classes=classes,
        **sizes | config,
    )
    return network


def _classes_of(weights: Path, name: str) -> int:
    """The number of classes of the weights, or 0 if they have no layer for classes."""
    layers = timm.models.get_pretrained_cfg(name).classifier
    first = layers if isinstance(layers, str) else layers[0]
    with safe_open(weights, framework="pt") as file:
        parameter = f"{first}.weight"
        return file.get_slice(parameter).get_shape()[0] if parameter in file.keys() else 0  # noqa: SIM118
