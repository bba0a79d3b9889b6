"""A network that counts, whichever library it is from: built, saved and loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.formats.tables import write_json
from stages.networks.libraries import library_of
from stages.networks.model_files import CONFIG, PREPROCESSOR, damaged, read_json, reason_of
from stages.networks.pretrained import check_pretrained
from stages.runtime.errors import UserError
from stages.runtime.machine import machine_error
from stages.runtime.params import ModelParams


@dataclass(frozen=True)
class Classifier:
    """A network with all that is needed to use it.

    `network` takes float images [batch, 3, size, size], normalized with `mean` and `std` per
    channel (of values from 0 to 1); its output i is the score of the quantity `labels[i]`.
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
    """transformers wraps them in an object, as some of torchvision's networks do in training."""
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


def build_classifier(
    model: ModelParams, pretrained: Path, labels: list[int], size: int
) -> Classifier:
    """A network for `labels`, on pretrained weights from that folder or random ones.

    The last layer starts at random where the weights have another number of labels.
    Raises UserError where params.yaml asks for what the library or the weights cannot do, and
    where the weights are not those that were downloaded; OSError where this machine fails.
    """
    if model.pretrained:
        check_pretrained(pretrained)
    library = library_of(model.library)
    try:
        network = library.build(model, pretrained, labels, size)
        _check_scores(network, labels, size)
    # A configuration can be wrong in as many ways as there are networks.
    except Exception as error:  # noqa: BLE001
        if of_machine := machine_error(error):
            raise of_machine from None
        raise UserError(
            f"{model.library} cannot build {model.name} with this model's name, config and"
            f" resize.size: {reason_of(error)}"
        ) from None
    return Classifier(network, labels, size, model.mean, model.std)


def _check_scores(network: nn.Module, labels: list[int], size: int) -> None:
    """Raise ValueError, or what the network raises, where it does not score an image."""
    with torch.no_grad():
        logits = logits_of(network.eval()(torch.zeros(1, 3, size, size)))
    if logits.shape != (1, len(labels)):
        raise ValueError(f"it gives {list(logits.shape)}, not a score for each of {labels}")


def save_classifier(classifier: Classifier, model: ModelParams, folder: Path, fit: str) -> None:
    """Write the files that the model's own library loads, and how to prepare images for it.

    `fit` is how photographs become squares, as in stages.imaging.jpeg.resize.
    """
    folder.mkdir(parents=True, exist_ok=True)
    network = classifier.network.cpu().to(memory_format=torch.contiguous_format)
    library_of(model.library).save(network, model, classifier.labels, folder)
    write_json(folder / PREPROCESSOR, _preprocessor_config(classifier, fit))


def load_classifier(folder: Path) -> Classifier:
    """What save_classifier wrote, ready to evaluate.

    Raises UserError where it is damaged, and OSError where this machine fails.
    """
    config, preparation = read_json(folder / CONFIG), read_json(folder / PREPROCESSOR)
    library = library_of(config.get("library", "transformers"))
    try:
        names = config["id2label"]
        labels = [int(names[str(number)]) for number in range(len(names))]
        network = library.load(folder, labels)
        size = preparation["crop_size"]["height"]
        _check_scores(network, labels, size)
        mean, std = preparation["image_mean"], preparation["image_std"]
    # As many ways to be wrong as above.
    except Exception as error:  # noqa: BLE001
        if of_machine := machine_error(error):
            raise of_machine from None
        raise damaged(folder, f"its files do not fit together: {reason_of(error)}") from None
    return Classifier(network, labels, size, mean, std)


def _preprocessor_config(classifier: Classifier, fit: str) -> dict[str, Any]:
    """In the form of transformers, whose AutoImageProcessor reads it."""
    side = classifier.size
    square = {"height": side, "width": side}
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        # The latter keeps the aspect ratio.
        "size": square if fit == "squeeze" else {"max_height": side, "max_width": side},
        "resample": 3,
        # What is smaller than this crop gets a black margin on both sides.
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": classifier.mean,
        "image_std": classifier.std,
    }
