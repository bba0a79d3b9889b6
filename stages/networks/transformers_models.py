"""Networks of transformers. No other module imports it."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.networks import hub
from stages.networks.backbone_classifier import BackboneClassifier
from stages.networks.model_files import CONFIG, WEIGHTS, read_json_object, refuse_random_layers
from stages.networks.positions import resize_positions
from stages.runtime.params import ModelParams

# Loading is fast, and this module checks which layers start at random.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

# The keys that this project sets in every configuration.
_OURS = {"id2label", "label2id", "num_labels", "dtype"}
# The beginning of the names of a BackboneClassifier's last layer, in its file.
HEAD = "classifier."
# The end of the name of what ViT and its relatives learn about the place of a patch.
POSITIONS = "position_embeddings"


def download(params: ModelParams, folder: Path) -> str:
    return hub.download_model(params.name, params.revision, folder)


def build(params: ModelParams, pretrained: Path, labels: list[int], size: int) -> nn.Module:
    if not params.pretrained:
        config = _config(params, {}, labels, size)
        auto = _auto_class(config)
        return _complete(auto.from_config(config, trust_remote_code=False), len(labels))
    values = read_json_object(pretrained / CONFIG)
    if values.get("model_type") != params.config["model_type"]:
        raise ValueError(f"its weights have the model_type {values.get('model_type')}")
    positions = _positions(pretrained / WEIGHTS)
    config = _config(params, values, labels, None if positions is None else size)
    return _pretrained(pretrained, config, labels, positions)


def save(network: nn.Module, params: ModelParams, labels: list[int], folder: Path) -> None:  # noqa: ARG001 - the config has the labels
    """Write the files that AutoModelForImageClassification.from_pretrained(folder) reads.

    For a BackboneClassifier, these are files that AutoModel reads, with two more weights.
    """
    if isinstance(network, BackboneClassifier):
        _save_backbone_classifier(network, folder)
        return
    saved: Any = network
    saved.save_pretrained(folder)


def _save_backbone_classifier(network: BackboneClassifier, folder: Path) -> None:
    network.backbone.save_pretrained(folder)
    head = {HEAD + name: value for name, value in network.classifier.state_dict().items()}
    save_file(load_file(folder / WEIGHTS) | head, folder / WEIGHTS, {"format": "pt"})
    # As transformers names the class in the config of a network that it saves.
    network.backbone.config.architectures = [BackboneClassifier.__name__]
    network.backbone.config.save_pretrained(folder)


def load(folder: Path, labels: list[int]) -> nn.Module:
    config = read_json_object(folder / CONFIG)
    has_backbone = config.get("architectures") == [BackboneClassifier.__name__]
    auto = transformers.AutoModel if has_backbone else transformers.AutoModelForImageClassification
    network, loading = _from_pretrained(folder, None, auto)
    wrong = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
    wrong |= {*loading["unexpected_keys"]}
    if has_backbone:
        head = _head(folder)
        wrong -= {HEAD + name for name in head}
        network = BackboneClassifier(network, len(labels))
        network.classifier.load_state_dict(head)
    if wrong:
        raise ValueError(f"{min(wrong)} does not fit {CONFIG}, or is missing from {WEIGHTS}")
    return network


def _auto_class(config: Any) -> Any:
    """The class of transformers that makes this type of network.

    It is AutoModel, which has no layer for classes, only for networks that describe images and of
    which transformers has no classifier.
    """
    if type(config) not in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        network = transformers.MODEL_MAPPING.get(type(config), None)
        takes_images = getattr(network, "main_input_name", None) == "pixel_values"
        # Masked autoencoders hide patches at random, not only in training.
        if takes_images and not hasattr(config, "mask_ratio"):
            return transformers.AutoModel
    return transformers.AutoModelForImageClassification


def _complete(network: Any, labels: int) -> nn.Module:
    """The network, with a layer for the labels if it has none of its own."""
    if type(network.config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return network  # type: ignore[no-any-return]
    return BackboneClassifier(network, labels)


def _pretrained(
    folder: Path, config: Any, labels: list[int], positions: Tensor | None
) -> nn.Module:
    """The network with the weights in `folder`, and with their position embeddings resized."""
    auto = _auto_class(config)
    network, loading = _from_pretrained(folder, config, auto)
    mismatched = {name for name, *_ in loading["mismatched_keys"]}
    if positions is not None:
        mismatched -= _set_positions(network, mismatched, positions)
    of_head = [] if auto is transformers.AutoModel else labels
    refuse_random_layers([*loading["missing_keys"], *mismatched], network, of_head)
    complete = _complete(network, len(labels))
    if isinstance(complete, BackboneClassifier):
        head = _head(folder)
        if head and len(head["bias"]) == len(labels):
            complete.classifier.load_state_dict(head)
    return complete


def _head(folder: Path) -> dict[str, Tensor]:
    """The weights of a BackboneClassifier's last layer, if the file in the folder has them."""
    weights = load_file(folder / WEIGHTS)
    return {
        name.removeprefix(HEAD): value for name, value in weights.items() if name.startswith(HEAD)
    }


def _from_pretrained(folder: Path, config: Any, auto: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The network with the weights in `folder`, and a report of those that did not fit."""
    network, loading = auto.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        local_files_only=True,
        output_loading_info=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    return network, loading


def _positions(weights: Path) -> Tensor | None:
    """The position embeddings of the weights, [1, positions, width], if they have one set."""
    with safe_open(weights, framework="pt") as file:
        names = [name for name in file.keys() if name.endswith(POSITIONS)]  # noqa: SIM118
        return file.get_tensor(names[0]) if len(names) == 1 else None


def _set_positions(network: nn.Module, names: Iterable[str], positions: Tensor) -> set[str]:
    """Resize position embeddings for those of `names` that are such. Returns their names."""
    own = network.state_dict()
    fitting = {
        name
        for name in names
        if name.endswith(POSITIONS) and own[name].shape[2:] == positions.shape[2:]
    }
    for name in fitting:
        own[name].copy_(resize_positions(positions, own[name].shape[1]))
    return fitting


def _config(
    params: ModelParams, values: dict[str, Any], labels: list[int], size: int | None
) -> Any:
    """The configuration `values`, with the model's changes to it.

    A network for one size of images gets `size`, if given, unless the model's changes name another.
    """
    default = transformers.AutoConfig.for_model(params.config["model_type"])
    known = default.to_dict()
    changes = {key: value for key, value in params.config.items() if key != "model_type"}
    if unknown := sorted(_unknown(changes, known)):
        # transformers would accept them silently.
        raise ValueError(f"its config has no key {', '.join(unknown)} that can be set")
    # If a type has several networks for images, transformers reads their names from this key.
    values = {"architectures": []} | values
    sizes = {} if size is None or "image_size" not in known else {"image_size": size}
    names = {number: str(label) for number, label in enumerate(labels)}
    of_labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    return type(default).from_dict(values | sizes | changes | of_labels)


def _unknown(
    values: Mapping[str, Any], known: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """The keys in `values`, at any depth, that `known` lacks or that this project sets."""
    for key, value in values.items():
        if key not in known or key in _OURS:
            yield prefix + key
        elif isinstance(value, dict) and isinstance(known[key], dict):
            yield from _unknown(value, known[key], f"{prefix}{key}.")
