"""Networks of transformers. No other module imports it or the client of its hub."""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import nn

from stages.networks.model_files import CONFIG, WEIGHTS, read_json, refuse_random_layers
from stages.runtime.errors import UserError
from stages.runtime.params import ModelParams

# Loading is fast, and this module checks which layers start at random.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
# Its warnings about retries contain signed URLs, which give anybody access to a file.
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

# The keys that this project sets in every configuration.
_OURS = {"id2label", "label2id", "num_labels", "dtype"}


def download(params: ModelParams, folder: Path) -> str:
    """Download the files of the hub's repository `name` at `revision`, byte for byte.

    The client resumes an interrupted download from a hidden folder beside them.
    """
    for name in (CONFIG, WEIGHTS):
        try:
            huggingface_hub.hf_hub_download(
                params.name, name, revision=params.revision, local_dir=folder
            )
        # The client raises errors of its own, of its HTTP library and of the system.
        except Exception as error:  # noqa: BLE001
            reason = _without_secrets(str(error).strip().partition("\n")[0])
            raise UserError(
                f"{name} of {params.name} at {params.revision} could not be downloaded: {reason}"
            ) from None
    return f"{huggingface_hub.constants.ENDPOINT}/{params.name}/tree/{params.revision}"


def _without_secrets(text: str) -> str:
    """Remove signatures of URLs, and the user's token, which a server may repeat in its answer."""
    text = re.sub(r"(https?://[^\s?]*)\?[^\s'\"]*", r"\1", text)
    token = huggingface_hub.get_token()
    return text.replace(token, "***") if token else text


def build(params: ModelParams, pretrained: Path, labels: list[int], size: int) -> nn.Module:
    config = _config(params, pretrained, labels, size)
    if not params.pretrained:
        network: nn.Module = transformers.AutoModelForImageClassification.from_config(
            config, trust_remote_code=False
        )
        return network
    network, loading = _from_pretrained(pretrained, config)
    mismatched = [name for name, *_ in loading["mismatched_keys"]]
    refuse_random_layers([*loading["missing_keys"], *mismatched], network, labels)
    return network


def save(network: nn.Module, params: ModelParams, labels: list[int], folder: Path) -> None:  # noqa: ARG001 - the config has the labels
    """Write the files that AutoModelForImageClassification.from_pretrained(folder) reads."""
    saved: Any = network
    saved.save_pretrained(folder)


def load(folder: Path, labels: list[int]) -> nn.Module:  # noqa: ARG001 - the config has the labels
    network, loading = _from_pretrained(folder, None)
    wrong = [name for name, *_ in loading["mismatched_keys"]]
    wrong += [*loading["missing_keys"], *loading["unexpected_keys"]]
    if wrong:
        raise ValueError(f"{wrong[0]} does not fit {CONFIG}, or is missing from {WEIGHTS}")
    return network


def _from_pretrained(folder: Path, config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The network with the weights in `folder`, and a report of those that did not fit."""
    network, loading = transformers.AutoModelForImageClassification.from_pretrained(
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


def _config(params: ModelParams, pretrained: Path, labels: list[int], size: int) -> Any:
    """The configuration of the weights, or the default one, with the model's changes to it."""
    model_type = params.config["model_type"]
    default = transformers.AutoConfig.for_model(model_type)
    known = default.to_dict()
    changes = {key: value for key, value in params.config.items() if key != "model_type"}
    if unknown := sorted(_unknown(changes, known)):
        # transformers would accept them silently.
        raise ValueError(f"its config has no key {', '.join(unknown)} that can be set")
    if params.pretrained:
        values = read_json(pretrained / CONFIG)
        if values.get("model_type") != model_type:
            raise ValueError(f"its weights have the model_type {values.get('model_type')}")
    else:
        # If a type has several networks for images, transformers reads their names from this key.
        values = {"architectures": []} | ({"image_size": size} if "image_size" in known else {})
    names = {number: str(label) for number, label in enumerate(labels)}
    of_labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    return type(default).from_dict(values | changes | of_labels)


def _unknown(
    values: Mapping[str, Any], known: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """The keys in `values`, at any depth, that `known` lacks or that this project sets."""
    for key, value in values.items():
        if key not in known or key in _OURS:
            yield prefix + key
        elif isinstance(value, dict) and isinstance(known[key], dict):
            yield from _unknown(value, known[key], f"{prefix}{key}.")
