"""The networks: fetching pretrained weights, building, saving and loading, for both libraries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
import torchvision
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.core.command import UserError
from stages.core.files import sha256_file, write_json

# The knobs are only read, so that a machine without pydantic can train too.
if TYPE_CHECKING:
    from stages.core.params import Model

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
SOURCE = "source.json"
# What this project sets in a configuration of transformers.
_GIVEN = {"id2label", "label2id", "num_labels"}

# One file, loaded and saved in no time.
transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class Classifier:
    """A network with all that is needed to use it.

    `network` takes float images [batch, 3, size, size], normalized with `mean` and `std` per
    channel (of values from 0 to 1); output i of it is the score of the quantity `labels[i]`.
    """

    network: nn.Module
    labels: list[int]
    size: int
    mean: list[float]
    std: list[float]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def logits(self, images: Tensor) -> Tensor:
        """[batch, len(labels)]."""
        return logits_of(self.network(images))


def logits_of(output: Any) -> Tensor:
    """transformers wraps them in an object, as some of torchvision's do in training."""
    logits: Tensor = getattr(output, "logits", output)
    return logits


def last_layer(network: nn.Module, labels: int) -> str:
    """The name of the layer that gives the scores: the last one with as many outputs as labels."""
    names: list[str] = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.shape[0] == labels
    ]
    if not names:
        raise UserError("the network has no last layer with an output for each label")
    return names[-1]


def freeze_backbone(classifier: Classifier) -> None:
    """Leave only the last layer to be trained."""
    classifier.network.requires_grad_(requires_grad=False)
    layer = last_layer(classifier.network, len(classifier.labels))
    classifier.network.get_submodule(layer).requires_grad_()


def download_pretrained(model: Model, folder: Path) -> str:
    """Put the pretrained weights, their config and source.json (where from, SHA-256) in `folder`.

    Returns the URL they are from.
    Raises UserError where the source does not have them or cannot be reached.
    """
    download = _download_torchvision if model.library == "torchvision" else _download_transformers
    source = download(model, folder)
    files = {name: sha256_file(folder / name) for name in (CONFIG, WEIGHTS)}
    write_json(folder / SOURCE, {"pretrained": True, "source": source, "sha256": files})
    return source


def mark_random_start(folder: Path) -> None:
    """Put in `folder` what says that there are no pretrained weights."""
    write_json(folder / SOURCE, {"pretrained": False})


def _download_torchvision(model: Model, folder: Path) -> str:
    try:
        weights = torchvision.models.get_model_weights(model.name)[model.revision]
    except (KeyError, ValueError):
        raise UserError(
            f"torchvision has no weights {model.revision} of {model.name}: check the revision and"
            " name of this model in params.yaml"
        ) from None
    try:
        # The file's name holds the start of its SHA-256, which check_hash compares.
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{weights.url} cannot be had: {error}") from None
    save_file(state, folder / WEIGHTS)
    categories = len(weights.meta["categories"])
    write_json(folder / CONFIG, _torchvision_config(model.name, categories, {}))
    url: str = weights.url
    return url


def _download_transformers(model: Model, folder: Path) -> str:
    for name in (CONFIG, WEIGHTS):
        try:
            huggingface_hub.hf_hub_download(
                model.name, name, revision=model.revision, local_dir=folder
            )
        # Its client raises errors of its own, of its HTTP library's and of the system's.
        except Exception as error:  # noqa: BLE001
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"{name} of {model.name} at {model.revision} cannot be had: {reason}"
            ) from None
    # The client's bookkeeping, with times in it.
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return f"{huggingface_hub.constants.ENDPOINT}/{model.name}/tree/{model.revision}"


def build_classifier(model: Model, pretrained: Path, labels: list[int], size: int) -> Classifier:
    """A network for `labels`, on pretrained weights from that folder or random ones.

    The layer that gives the scores starts at random where its shape is another for these labels.
    Raises UserError where params.yaml asks for what the library or the weights cannot do.
    """
    build = _build_torchvision if model.library == "torchvision" else _build_transformers
    try:
        network = build(model, pretrained, labels, size)
        _try(network, labels, size)
    # A configuration can be wrong in as many ways as there are networks.
    except Exception as error:  # noqa: BLE001
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{model.library} cannot build {model.name} with this model's name, config and"
            f" resize.size: {reason}"
        ) from None
    return Classifier(network, labels, size, model.mean, model.std)


def _try(network: nn.Module, labels: list[int], size: int) -> None:
    """Raise ValueError, or what the network raises, where it does not score an image."""
    with torch.no_grad():
        # In training some take other ways too; a copy, since batch normalization learns in it.
        deepcopy(network).train()(torch.zeros(2, 3, size, size))
        logits = logits_of(network.eval()(torch.zeros(1, 3, size, size)))
    if logits.shape != (1, len(labels)):
        raise ValueError(f"it gives {list(logits.shape)}, not a score for each of {labels}")


def _refuse_random_layers(names: Iterable[str], network: nn.Module, labels: list[int]) -> None:
    """Raise ValueError where a parameter is not in the weights that is no score's.

    Old weights lack the counts of batch normalization, which nothing depends on.
    """
    own = network.state_dict()
    unexpected = [
        name
        for name in sorted(names)
        if own[name].shape[:1] != (len(labels),) and not name.endswith("num_batches_tracked")
    ]
    if unexpected:
        shape = list(own[unexpected[0]].shape)
        raise ValueError(f"its weights have no {unexpected[0]} of the shape {shape}")


def _build_torchvision(model: Model, pretrained: Path, labels: list[int], _size: int) -> nn.Module:
    network: nn.Module = torchvision.models.get_model(
        model.name, weights=None, num_classes=len(labels), **model.config
    )
    if model.pretrained:
        own = network.state_dict()
        weights = load_file(pretrained / WEIGHTS)
        fitting = {
            name: weight
            for name, weight in weights.items()
            if name in own and own[name].shape == weight.shape
        }
        _refuse_random_layers(own.keys() - fitting.keys(), network, labels)
        _load_weights(network, own | fitting)
    return network


def _load_weights(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Strictly, with the network's versions of its layers, as safetensors keeps none."""
    state = network.state_dict()
    state.clear()
    state.update(weights)
    network.load_state_dict(state)


def _build_transformers(model: Model, pretrained: Path, labels: list[int], size: int) -> nn.Module:
    names = {number: str(label) for number, label in enumerate(labels)}
    head = {"id2label": names, "label2id": {label: number for number, label in names.items()}}
    model_type = model.config["model_type"]
    known = transformers.AutoConfig.for_model(model_type).to_dict().keys() - _GIVEN
    if unknown := set(model.config) - known:
        # transformers would keep them without a word.
        raise ValueError(f"its config has no {', '.join(sorted(unknown))} to set")
    if not model.pretrained:
        # Where a type has several networks for images, transformers looks for one of these names.
        defaults = {"image_size": size, "architectures": []}
        config = transformers.AutoConfig.for_model(**defaults | model.config, **head)
        network: nn.Module = transformers.AutoModelForImageClassification.from_config(config)
        return network
    changes = {key: value for key, value in model.config.items() if key != "model_type"}
    config = transformers.AutoConfig.from_pretrained(pretrained, **changes, **head)
    if config.model_type != model_type:
        raise ValueError(f"its weights are of the model_type {config.model_type}")
    pretrained_network: nn.Module
    pretrained_network, loading = transformers.AutoModelForImageClassification.from_pretrained(
        pretrained,
        config=config,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    mismatched = [name for name, *_ in loading["mismatched_keys"]]
    _refuse_random_layers([*loading["missing_keys"], *mismatched], pretrained_network, labels)
    return pretrained_network


def save_classifier(classifier: Classifier, model: Model, folder: Path) -> None:
    """Write the form that the model's own library loads, and how to prepare images for it.

    transformers: AutoModelForImageClassification.from_pretrained(folder). torchvision: the state
    dict of torchvision.models.get_model, as safetensors, and a config that names the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    network = classifier.network.cpu().to(memory_format=torch.contiguous_format)
    if isinstance(network, transformers.PreTrainedModel):
        network.save_pretrained(folder)
    else:
        save_file(network.state_dict(), folder / WEIGHTS)
        labels = {str(number): str(label) for number, label in enumerate(classifier.labels)}
        config = _torchvision_config(model.name, len(labels), model.config)
        config["id2label"] = labels
        write_json(folder / CONFIG, config)
    write_json(folder / PREPROCESSOR, _preprocessor_config(classifier))


def load_classifier(folder: Path) -> Classifier:
    """What save_classifier wrote, ready to evaluate."""
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    preprocessor = json.loads((folder / PREPROCESSOR).read_text("utf-8"))
    labels = [int(config["id2label"][str(number)]) for number in range(len(config["id2label"]))]
    network: nn.Module
    if config.get("library") == "torchvision":
        network = torchvision.models.get_model(
            config["name"], weights=None, num_classes=config["num_classes"], **config["config"]
        )
        _load_weights(network, load_file(folder / WEIGHTS))
    else:
        network = transformers.AutoModelForImageClassification.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32
        )
    return Classifier(
        network.eval(),
        labels,
        preprocessor["size"]["height"],
        preprocessor["image_mean"],
        preprocessor["image_std"],
    )


def _torchvision_config(name: str, classes: int, config: dict[str, Any]) -> dict[str, Any]:
    return {"library": "torchvision", "name": name, "num_classes": classes, "config": config}


def _preprocessor_config(classifier: Classifier) -> dict[str, Any]:
    """In the form of transformers, whose AutoImageProcessor reads it."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": classifier.size, "width": classifier.size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": classifier.mean,
        "image_std": classifier.std,
    }
