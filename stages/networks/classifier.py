"""The networks: fetching pretrained weights, building, saving and loading, for both libraries."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
import torchvision
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.formats.tables import write_json
from stages.networks.model_files import (
    CONFIG,
    PREPROCESSOR,
    SOURCE,
    WEIGHTS,
    check_pretrained,
    damaged,
    read_json,
    read_weights,
    reason_of,
    record_source,
)
from stages.runtime.errors import UserError
from stages.runtime.files import sha256_file
from stages.runtime.space import DiskFullError, space_for

# The knobs are only read, so that a machine without pydantic can train too.
if TYPE_CHECKING:
    from stages.runtime.params import Model

# What this project sets in a configuration of transformers, and the name of a place.
_GIVEN = {"id2label", "label2id", "num_labels", "dtype", "_name_or_path"}
# The same in one of torchvision; `weights` would download some.
_GIVEN_TO_TORCHVISION = {"name", "weights", "num_classes"}
# Beyond these a configuration is wrong, and would fill the memory. The largest networks have some
# 1,100 layers and 3 * 10^9 weights.
_MOST_LAYERS = 5_000
_MOST_WEIGHTS = 10**10
_MOST_NUMBER = 10**6
_PIXELS = range(8, 4096 + 1)

# One file, loaded and saved in no time.
transformers.utils.logging.disable_progress_bar()
# Its warnings, of what it tries again, repeat URLs whose signature opens a file to everybody.
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


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
    record_source(folder, source)
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
    url: str = weights.url
    _refuse_changed_copy(url)
    size = int(weights.meta["_file_size"] * 2**20)
    downloads = Path(torch.hub.get_dir(), "checkpoints")
    downloads.mkdir(parents=True, exist_ok=True)
    try:
        with space_for(downloads / url.rpartition("/")[2], size):
            # The file's name holds the start of its SHA-256, which check_hash compares.
            state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{url} cannot be had: {error}") from None
    with space_for(folder / WEIGHTS, size):
        save_file(state, folder / WEIGHTS)
    categories = len(weights.meta["categories"])
    write_json(folder / CONFIG, _torchvision_config(model.name, categories, {}))
    return url


def _refuse_changed_copy(url: str) -> None:
    """Raise UserError where torch kept another file: it checks what it downloads only."""
    name = url.rpartition("/")[2]
    kept = Path(torch.hub.get_dir(), "checkpoints", name)
    start = re.search("-([0-9a-f]{8,})[.]", name)
    if start and kept.exists() and not sha256_file(kept).startswith(start[1]):
        raise UserError(f"{kept} is not the file of {url}: remove it, and run again")


def _download_transformers(model: Model, folder: Path) -> str:
    for name in (CONFIG, WEIGHTS):
        try:
            with space_for(folder / name, 0):
                huggingface_hub.hf_hub_download(
                    model.name, name, revision=model.revision, local_dir=folder
                )
        except DiskFullError:
            raise
        # Its client raises errors of its own, of its HTTP library's and of the system's.
        except Exception as error:  # noqa: BLE001
            reason = _without_secrets(str(error).strip().partition("\n")[0])
            raise UserError(
                f"{name} of {model.name} at {model.revision} cannot be had: {reason}"
            ) from None
    # The client's bookkeeping, with times in it.
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return f"{huggingface_hub.constants.ENDPOINT}/{model.name}/tree/{model.revision}"


def _without_secrets(text: str) -> str:
    """Without signatures in URLs and the user's token, which a server may repeat."""
    text = re.sub(r"(https?://[^\s?]*)\?[^\s'\"]*", r"\1", text)
    token = huggingface_hub.get_token()
    return text.replace(token, "***") if token else text


def build_classifier(model: Model, pretrained: Path, labels: list[int], size: int) -> Classifier:
    """A network for `labels`, on pretrained weights from that folder or random ones.

    The layer that gives the scores starts at random where its shape is another for these labels.
    Raises UserError where params.yaml asks for what the library or the weights cannot do, and
    where the weights are not those that were downloaded.
    """
    if model.pretrained:
        check_pretrained(pretrained)
    build = _build_torchvision if model.library == "torchvision" else _build_transformers
    try:
        network = build(model, pretrained, labels, size)
        _try(network, labels, size)
    except UserError:
        raise
    # A configuration can be wrong in as many ways as there are networks.
    except Exception as error:  # noqa: BLE001
        raise UserError(
            f"{model.library} cannot build {model.name} with this model's name, config and"
            f" resize.size: {reason_of(error)}"
        ) from None
    return Classifier(network, labels, size, model.mean, model.std)


def _try(network: nn.Module, labels: list[int], size: int) -> None:
    """Raise ValueError, or what the network raises, where it does not score an image."""
    with torch.no_grad():
        # In training some take other ways too; a copy, since batch normalization learns in it.
        deepcopy(network).train()(torch.zeros(2, 3, size, size))
    _try_scoring(network, labels, size)


def _try_scoring(network: nn.Module, labels: list[int], size: int) -> None:
    with torch.no_grad():
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


def _plan(build: Callable[[], nn.Module], weights: Mapping[str, Tensor]) -> nn.Module:
    """The network without memory for its weights, where its library can do that.

    Raises ValueError where it is far larger than these `weights` ({}: than any), or they are
    numbers of another kind.
    """
    with _few_layers(), torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                plan = build()
        except NotImplementedError:
            # torchvision's RegNets compute their widths with tensors.
            plan = build()
    most = 2 * sum(map(Tensor.numel, weights.values())) + 10**7 if weights else _MOST_WEIGHTS
    size = sum(map(Tensor.numel, plan.parameters()))
    if size > most:
        raise ValueError(f"its config asks for a network of {size:,} weights")
    for name, value in plan.state_dict().items():
        found = weights.get(name, value)
        if found.is_floating_point() != value.is_floating_point():
            raise ValueError(f"its {name} is {found.dtype}, not {value.dtype}")
    return plan


@contextmanager
def _few_layers() -> Iterator[None]:
    """Raise ValueError where more layers are made than any network has."""
    made = 0

    def count(*_: object) -> None:
        nonlocal made
        made += 1
        if made > _MOST_LAYERS:
            raise ValueError(f"its config asks for more than {_MOST_LAYERS:,} layers")

    hook = nn.modules.module.register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _refuse_huge_numbers(values: Any, key: str = "value") -> None:
    """Raise ValueError where a number in a configuration, at any depth, is one that none needs."""
    if isinstance(values, dict):
        for name, value in values.items():
            _refuse_huge_numbers(value, name)
    elif isinstance(values, list):
        for value in values:
            _refuse_huge_numbers(value, key)
    elif isinstance(values, int) and abs(values) > _MOST_NUMBER:
        raise ValueError(f"its config has a {key} of {values}")


def _torchvision_network(name: str, labels: list[int], config: dict[str, Any]) -> nn.Module:
    """Raises what the library raises, and ValueError for what is no classifier or no setting.

    Builders of other networks download the weights of a part of them.
    """
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"it has no classifier {name!a:.100}")
    if taken := _GIVEN_TO_TORCHVISION & config.keys():
        raise ValueError(f"its config has no {', '.join(sorted(taken))} to set")
    _refuse_huge_numbers(config)
    network: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=len(labels), **config
    )
    return network


def _build_torchvision(model: Model, pretrained: Path, labels: list[int], _size: int) -> nn.Module:
    weights = read_weights(pretrained / WEIGHTS) if model.pretrained else {}

    def build() -> nn.Module:
        return _torchvision_network(model.name, labels, model.config)

    own = _plan(build, weights).state_dict()
    fitting = {
        name: weight
        for name, weight in weights.items()
        if name in own and own[name].shape == weight.shape
    }
    network = build()
    if model.pretrained:
        _refuse_random_layers(own.keys() - fitting.keys(), network, labels)
        _load_weights(network, network.state_dict() | fitting)
    return network


def _load_weights(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Strictly, with the network's versions of its layers, as safetensors keeps none."""
    state = network.state_dict()
    state.clear()
    state.update(weights)
    network.load_state_dict(state)


def _build_transformers(model: Model, pretrained: Path, labels: list[int], size: int) -> nn.Module:
    changes = {key: value for key, value in model.config.items() if key != "model_type"}
    model_type = model.config["model_type"]
    known = _default_config(model_type).to_dict()
    if unknown := sorted(_unknown(changes, known)):
        # transformers would keep them without a word, and obey some.
        raise ValueError(f"its config has no {', '.join(unknown)} to set")
    if not model.pretrained:
        # Where a type has several networks for images, transformers looks for one of these names.
        defaults = {"image_size": size, "architectures": []}
        config = _config(model_type, defaults | changes, labels, {})
        _plan(lambda: _transformers_network(config), {})
        return _transformers_network(config)
    found = read_json(pretrained / CONFIG)
    if found.get("model_type") != model_type:
        raise ValueError(f"its weights are of the model_type {found.get('model_type')!s:.100}")
    config = _config(model_type, found, labels, changes)
    network, loading = _filled(config, read_weights(pretrained / WEIGHTS))
    mismatched = [name for name, *_ in loading["mismatched_keys"]]
    _refuse_random_layers([*loading["missing_keys"], *mismatched], network, labels)
    return network


def _default_config(model_type: str) -> Any:
    if model_type == "timm_wrapper":
        raise ValueError("timm_wrapper's config names files, here and on hubs, to read")
    return transformers.AutoConfig.for_model(model_type)


def _config(
    model_type: str, values: Mapping[str, Any], labels: list[int], changes: Mapping[str, Any]
) -> Any:
    """The configuration that `values`, those of config.json, and `changes` to them make.

    It has what the type's own has. Whatever else a file says is left out: transformers obeys
    some of it, such as code to import, other weights to read, or how they are quantized.
    """
    default = _default_config(model_type)
    names = {number: str(label) for number, label in enumerate(labels)}
    head = {"id2label": names, "label2id": {label: number for number, label in names.items()}}
    known = _only_known(values, default.to_dict())
    _refuse_huge_numbers([known, changes])
    return type(default).from_dict(known | head, **changes)


def _unknown(values: Mapping[str, Any], known: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """The keys in `values`, at any depth, that are not `known` or not to be set."""
    for key, value in values.items():
        if key not in known or key in _GIVEN:
            yield place + key
        elif isinstance(value, dict) and isinstance(known[key], dict):
            yield from _unknown(value, known[key], f"{place}{key}.")


def _only_known(values: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Without what _unknown names."""
    kept = {key: value for key, value in values.items() if key in known and key not in _GIVEN}
    return {
        key: _only_known(value, known[key])
        if isinstance(value, dict) and isinstance(known[key], dict)
        else value
        for key, value in kept.items()
    }


def _transformers_network(config: Any) -> nn.Module:
    network: nn.Module = transformers.AutoModelForImageClassification.from_config(
        config, trust_remote_code=False
    )
    return network


def _filled(config: Any, weights: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a configuration with these weights, and what fitted and what did not."""
    plan: Any = _plan(lambda: _transformers_network(config), weights)
    # Without a folder, there is nothing else to be found in it.
    network, loading = type(plan).from_pretrained(
        None,
        config=config,
        state_dict=weights,
        ignore_mismatched_sizes=True,
        trust_remote_code=False,
        dtype=torch.float32,
        output_loading_info=True,
    )
    return network, loading


def save_classifier(classifier: Classifier, model: Model, folder: Path) -> None:
    """Write the form that the model's own library loads, and how to prepare images for it.

    transformers: AutoModelForImageClassification.from_pretrained(folder). torchvision: the state
    dict of torchvision.models.get_model, as safetensors, and a config that names the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    network = classifier.network.cpu().to(memory_format=torch.contiguous_format)
    with space_for(folder / WEIGHTS, sum(value.nbytes for value in network.state_dict().values())):
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
    """What save_classifier wrote, ready to evaluate. Raises UserError where a file is damaged."""
    config = read_json(folder / CONFIG)
    labels = _labels(folder / CONFIG, config)
    size, mean, std = _preparation(folder / PREPROCESSOR)
    weights = read_weights(folder / WEIGHTS)
    load = _load_torchvision if config.get("library") == "torchvision" else _load_transformers
    try:
        network = load(config, weights, labels)
        _try_scoring(network, labels, size)
    # As in build_classifier.
    except Exception as error:  # noqa: BLE001
        reason = f"it, {CONFIG} and {PREPROCESSOR} do not go together: {reason_of(error)}"
        raise damaged(folder / WEIGHTS, reason) from None
    return Classifier(network.eval(), labels, size, mean, std)


def _labels(path: Path, config: Mapping[str, Any]) -> list[int]:
    """The quantities that the outputs are of, as the file at `path` names them."""
    names = config.get("id2label")
    names = names if isinstance(names, dict) else {}
    texts = [str(names.get(str(number))) for number in range(len(names))]
    labels = [int(text) for text in texts if re.fullmatch("[0-9]{1,10}", text)]
    if not labels or len(set(labels)) < len(names):
        raise damaged(path, "its id2label does not name a quantity for each output")
    return labels


def _preparation(path: Path) -> tuple[int, list[float], list[float]]:
    """The size of images in pixels, and mean and standard deviation per channel."""
    found = read_json(path)
    sides = found.get("size")
    size = sides.get("height") if isinstance(sides, dict) else None
    if sides != {"height": size, "width": size} or type(size) is not int or size not in _PIXELS:
        raise damaged(path, f"its size is no square of {_PIXELS[0]} to {_PIXELS[-1]} pixels")
    mean, std = _channels(path, found, "image_mean"), _channels(path, found, "image_std")
    if min(std) <= 0:
        raise damaged(path, "its image_std is not above 0")
    return size, mean, std


def _channels(path: Path, found: Mapping[str, Any], key: str) -> list[float]:
    values = found.get(key)
    values = values if isinstance(values, list) else []
    numbers = [one for one in values if type(one) in (int, float) and abs(one) <= _MOST_NUMBER]
    if len(numbers) != 3 or len(values) != 3:
        raise damaged(path, f"its {key} is not a number for each of three channels")
    return [float(number) for number in numbers]


def _load_torchvision(
    config: Mapping[str, Any], weights: dict[str, Tensor], labels: list[int]
) -> nn.Module:
    def build() -> nn.Module:
        return _torchvision_network(config["name"], labels, config["config"])

    _plan(build, weights)
    network = build()
    _load_weights(network, weights)
    return network


def _load_transformers(
    config: Mapping[str, Any], weights: dict[str, Tensor], labels: list[int]
) -> nn.Module:
    network, loading = _filled(_config(config["model_type"], config, labels, {}), weights)
    mismatched = {name for name, *_ in loading["mismatched_keys"]}
    if wrong := sorted(mismatched | loading["missing_keys"] | loading["unexpected_keys"]):
        # transformers would start them at random.
        raise ValueError(f"{wrong[0]} is missing or of another shape on one side")
    return network


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
