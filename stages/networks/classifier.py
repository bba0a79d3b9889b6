"""Classifiers that count items: building, saving and loading them, whatever the library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.formats.tables import write_json
from stages.networks.layers import depths_of, layers_of
from stages.networks.libraries import library_of
from stages.networks.model_files import CONFIG, PREPROCESSOR, damaged, read_json_object, reason_of
from stages.networks.pretrained import check_pretrained
from stages.runtime.counts import parse_label
from stages.runtime.errors import UserError
from stages.runtime.machine import machine_error
from stages.runtime.params import ModelParams, Precision


@dataclass(frozen=True)
class Classifier:
    """A network with everything that is needed to use it.

    `network` takes float images [batch, 3, size, size] with values from 0 to 1, normalized by
    `mean` and `std` per channel. Its output i is the score of the quantity `labels[i]`, or if that
    is AndMore, of it and all higher ones. `precision` is the setting that it was trained
    with. If `average_mirrored`, an image is scored as it is and mirrored.
    """

    network: nn.Module
    labels: list[int]
    size: int
    mean: list[float]
    std: list[float]
    precision: Precision = "auto"
    average_mirrored: bool = False

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def outputs(self) -> list[nn.Module]:
        """The layers that compute the scores, see output_layers."""
        return output_layers(self.network, len(self.labels))

    @property
    def layers(self) -> list[str]:
        """The names of the layers, see layers_of."""
        return layers_of(self.network, self.outputs)

    @property
    def depths(self) -> dict[str, int]:
        """How deep each parameter is, see depths_of."""
        return depths_of(self.network, self.layers, self.outputs)

    def logits(self, images: Tensor) -> Tensor:
        """The scores of the labels, [batch, labels]."""
        logits = logits_of(self.network(images))
        if self.average_mirrored:
            logits = (logits + logits_of(self.network(images.flip(3)))) / 2
        return logits


def logits_of(output: Any) -> Tensor:
    """The logits in a network's output, which may be an object that contains them.

    Networks of transformers return such an object, and some of torchvision's do in training.
    """
    logits: Tensor = getattr(output, "logits", output)
    return logits


def output_layers(network: nn.Module, labels: int) -> list[nn.Module]:
    """The layers that compute the scores: the last one with an output per label, and its equals.

    Networks that learned from a teacher, like some of DeiT and LeViT, average two such layers.
    """
    layers = [
        module
        for module in network.modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.shape[0] == labels
    ]
    if not layers:
        raise UserError("the network has no layer with one output for each label")
    return [layer for layer in layers if layer.weight.shape == layers[-1].weight.shape]


def freeze_backbone(classifier: Classifier) -> None:
    """Freeze everything except the layers that compute the scores."""
    classifier.network.requires_grad_(requires_grad=False)
    for layer in classifier.outputs:
        layer.requires_grad_()


def freeze_first_layers(classifier: Classifier, count: int) -> None:
    """Freeze the first `count` layers and everything before them.

    Raises UserError if the network does not have so many.
    """
    layers = classifier.layers
    if count > len(layers):
        raise UserError(
            f"freeze is {count}, but the network has {len(layers)} layers"
            f" ({', '.join(layers)}): set this model's freeze to {len(layers)} or less"
        )
    depths = classifier.depths
    for name, parameter in classifier.network.named_parameters():
        parameter.requires_grad_(depths[name] > count)


def checkpoint_gradients(network: nn.Module) -> None:
    """Recompute activations in the backward pass instead of keeping them.

    Networks of transformers and timm offer this, each with a method of its own. Raises UserError if
    this network does not.
    """
    for name in ("activation_checkpointing_enable", "set_grad_checkpointing"):
        if enable := getattr(network, name, None):
            try:
                enable()
            # The networks of a library all have the method, but not all of them support it.
            except (ValueError, AssertionError) as error:
                raise UserError(f"checkpoint_gradients: {reason_of(error)}") from None
            return
    raise UserError("checkpoint_gradients is true, but networks of torchvision do not offer it")


@torch.no_grad()
def divide_logits(classifier: Classifier, temperature: float) -> None:
    """Change the weights so that all logits are divided by the temperature."""
    for layer in classifier.outputs:
        for parameter in layer.parameters():
            parameter.div_(temperature)


def build_classifier(
    params: ModelParams, pretrained: Path, labels: list[int], size: int
) -> Classifier:
    """A network for `labels` that starts from weights in the folder `pretrained`, or at random.

    The last layer starts at random if the weights have another number of labels. Raises UserError
    if the library or the weights do not support what params.yaml says, or if the weights are not
    those that were downloaded; OSError if this machine fails.
    """
    if params.pretrained:
        check_pretrained(pretrained)
    library = library_of(params.library)
    try:
        network = library.build(params, pretrained, labels, size)
        _check_scores(network, labels, size)
    # Each network fails in its own way if its configuration is wrong.
    except Exception as error:  # noqa: BLE001
        if of_machine := machine_error(error):
            raise of_machine from None
        raise UserError(
            f"{params.library} cannot build {params.name} with this model's name and config for"
            f" images of {size} pixels: {reason_of(error)}"
        ) from None
    return Classifier(
        network,
        labels,
        size,
        params.mean,
        params.std,
        params.precision,
        average_mirrored=params.average_mirrored,
    )


def _check_scores(network: nn.Module, labels: list[int], size: int) -> None:
    """Raise ValueError, or what the network raises, if it does not give a score per label."""
    with torch.no_grad():
        logits = logits_of(network.eval()(torch.zeros(1, 3, size, size)))
    if logits.shape != (1, len(labels)):
        raise ValueError(
            f"its output has the shape {list(logits.shape)}, not a score for each of {labels}"
        )


def save_classifier(classifier: Classifier, params: ModelParams, folder: Path, fit: str) -> None:
    """Write the files that the model's library loads, and a description of its preprocessing.

    `fit` says how photographs are made square, as in stages.imaging.jpeg.resize.
    """
    folder.mkdir(parents=True, exist_ok=True)
    network = classifier.network.cpu().to(memory_format=torch.contiguous_format)
    library_of(params.library).save(network, params, classifier.labels, folder)
    write_json(folder / PREPROCESSOR, _preprocessor_config(classifier, fit))


def load_classifier(folder: Path) -> Classifier:
    """The classifier that save_classifier wrote to `folder`, in evaluation mode.

    Raises UserError if a file is damaged, and OSError if this machine fails.
    """
    config, preparation = read_json_object(folder / CONFIG), read_json_object(folder / PREPROCESSOR)
    library = library_of(config.get("library", "transformers"))
    try:
        names = config["id2label"]
        labels = [parse_label(names[str(number)]) for number in range(len(names))]
        network = library.load(folder, labels)
        size = preparation["crop_size"]["height"]
        _check_scores(network, labels, size)
        mean, std = preparation["image_mean"], preparation["image_std"]
    # Each network fails in its own way if its files do not fit.
    except Exception as error:  # noqa: BLE001
        if of_machine := machine_error(error):
            raise of_machine from None
        raise damaged(folder, f"its files do not fit together: {reason_of(error)}") from None
    return Classifier(network, labels, size, mean, std)


def _preprocessor_config(classifier: Classifier, fit: str) -> dict[str, Any]:
    """The file that AutoImageProcessor of transformers reads."""
    side = classifier.size
    square = {"height": side, "width": side}
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        # max_height and max_width keep the aspect ratio.
        "size": square if fit == "squeeze" else {"max_height": side, "max_width": side},
        "resample": 3,
        # A crop that is larger than the image adds black margins.
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": classifier.mean,
        "image_std": classifier.std,
    }
