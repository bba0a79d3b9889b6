"""The files of a model: their names, digests and checks."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from torch import Tensor, nn

from stages.runtime.errors import UserError
from stages.runtime.files import sha256_file
from stages.runtime.params import Block

Settings = TypeVar("Settings", bound=Block)

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
# The record of where pretrained weights come from.
SOURCE = "source.json"


def damaged(path: Path, reason: str) -> UserError:
    """An error about a file of a model, or about its folder."""
    return UserError(
        f"{path} is damaged ({reason}): remove it, and get it back with `dvc checkout`, `dvc pull`"
        " or `dvc repro`"
    )


def reason_of(error: Exception) -> str:
    """The error's text, in one short line."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError if the file is something else."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise damaged(path, f"not JSON: {reason_of(error)}") from None
    if not isinstance(found, dict):
        raise damaged(path, "not a JSON object")
    return found


def read_settings(path: Path, kind: type[Settings]) -> Settings:
    """Read a JSON object of this kind. Raises UserError if the file is something else."""
    try:
        return kind.model_validate(read_json_object(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of each of these files."""
    return {name: sha256_file(folder / name) for name in names}


def check_digests(
    folder: Path, names: Iterable[str], expected: Mapping[str, str], record: Path
) -> None:
    """Raise UserError if a file's SHA-256 is not the expected one, which the file `record` has."""
    for name in names:
        if sha256_file(folder / name) != expected.get(name):
            raise damaged(folder / name, f"its SHA-256 is not the one in {record}")


def load_fitting_weights(
    network: nn.Module, weights: Mapping[str, Tensor], labels: list[int]
) -> None:
    """Load the weights, except those of a last layer for another number of labels.

    Such a layer starts with torch's own random weights. Those of EfficientNets and MNASNets are
    larger the fewer labels there are. With five, the first scores would be so far off that learning
    them would spoil all other weights. Raises ValueError if other parameters of the network are not
    among the weights.
    """
    own = network.state_dict()
    fitting = {
        name: weight
        for name, weight in weights.items()
        if name in own and own[name].shape == weight.shape
    }
    missing = own.keys() - fitting.keys()
    refuse_random_layers(missing, network, labels)
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and f"{name}.weight" in missing:
            module.reset_parameters()
    load_weights(network, network.state_dict() | fitting)


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights as those of the current version of each layer.

    safetensors does not store the versions, and MNASNet refuses weights without one.
    """
    state = network.state_dict()
    state.clear()
    state.update(weights)
    network.load_state_dict(state)


def refuse_random_layers(missing: Iterable[str], network: nn.Module, labels: list[int]) -> None:
    """Raise ValueError if the weights lack parameters of other layers than the last one.

    `missing` names the parameters that the weights lack or have in another shape. The counters of
    batch normalization may be missing, as in old weights, because nothing depends on them.
    """
    own = network.state_dict()
    for name in sorted(missing):
        shape = list(own[name].shape)
        if shape[:1] != [len(labels)] and not name.endswith("num_batches_tracked"):
            raise ValueError(f"its weights have no {name} with the shape {shape}")
