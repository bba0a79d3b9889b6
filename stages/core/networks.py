"""The networks: fetching pretrained weights, building, saving and loading, for both libraries."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import torchvision
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.core import params
from stages.core.command import UserError
from stages.core.files import sha256_file, write_json

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
SOURCE = "source.json"

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
        """[batch, len(labels)]; transformers wraps them in an object, torchvision does not."""
        output = self.network(images)
        logits: Tensor = getattr(output, "logits", output)
        return logits


def download_pretrained(model: params.Model, folder: Path) -> str:
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


def _download_torchvision(model: params.Model, folder: Path) -> str:
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
    write_json(folder / CONFIG, _torchvision_config(model, len(weights.meta["categories"])))
    url: str = weights.url
    return url


def _download_transformers(model: params.Model, folder: Path) -> str:
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


def build_classifier(
    model: params.Model, pretrained: Path, labels: list[int], size: int
) -> Classifier:
    """A network for `labels`, on pretrained weights from that folder or random ones.

    What has the wrong shape for the number of labels (the last layer) starts at random.
    Raises UserError where params.yaml asks for what the library or the weights cannot do.
    """
    build = _build_torchvision if model.library == "torchvision" else _build_transformers
    try:
        network = build(model, pretrained, labels, size)
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{model.library} cannot build {model.name}: {reason}") from None
    return Classifier(network, labels, size, model.mean, model.std)


def _build_torchvision(
    model: params.Model, pretrained: Path, labels: list[int], _size: int
) -> nn.Module:
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
        network.load_state_dict(own | fitting)
    return network


def _build_transformers(
    model: params.Model, pretrained: Path, labels: list[int], size: int
) -> nn.Module:
    names = {number: str(label) for number, label in enumerate(labels)}
    head = {"id2label": names, "label2id": {label: number for number, label in names.items()}}
    known = transformers.AutoConfig.for_model(model.config["model_type"]).to_dict()
    if unknown := set(model.config) - set(known):
        # transformers would keep them without a word.
        raise ValueError(f"its config has no {', '.join(sorted(unknown))}")
    if not model.pretrained:
        config = transformers.AutoConfig.for_model(**{"image_size": size} | model.config, **head)
        network: nn.Module = transformers.AutoModelForImageClassification.from_config(config)
        return network
    changes = {key: value for key, value in model.config.items() if key != "model_type"}
    config = transformers.AutoConfig.from_pretrained(pretrained, **changes, **head)
    if getattr(config, "image_size", size) != size:
        raise ValueError(f"resize.size is {size}, its weights are for {config.image_size}")
    pretrained_network: nn.Module = transformers.AutoModelForImageClassification.from_pretrained(
        pretrained,
        config=config,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        dtype=torch.float32,
    )
    return pretrained_network


def save_classifier(classifier: Classifier, model: params.Model, folder: Path) -> None:
    """Write the form that the model's own library loads, and how to prepare images for it.

    transformers: AutoModelForImageClassification.from_pretrained(folder). torchvision: the state
    dict of torchvision.models.get_model, as safetensors, and a config that names the model.
    """
    network = classifier.network.cpu().to(memory_format=torch.contiguous_format)
    if isinstance(network, transformers.PreTrainedModel):
        network.save_pretrained(folder)
    else:
        save_file(network.state_dict(), folder / WEIGHTS)
        labels = {str(number): str(label) for number, label in enumerate(classifier.labels)}
        config = _torchvision_config(model, len(labels)) | {"id2label": labels}
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
        network.load_state_dict(load_file(folder / WEIGHTS))
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


def _torchvision_config(model: params.Model, classes: int) -> dict[str, Any]:
    return {
        "library": "torchvision",
        "name": model.name,
        "num_classes": classes,
        "config": model.config,
    }


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
