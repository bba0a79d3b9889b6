"""Networks of many kinds: a step of training, freezing, saving and loading."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

from stages.networks.classifier import (
    Classifier,
    divide_logits,
    freeze_backbone,
    load_classifier,
    logits_of,
    output_layers,
    save_classifier,
)
from stages.runtime.errors import UserError
from tests.builders import (
    SIZE,
    TINY_CONVNEXT,
    TINY_RESNET,
    TINY_VIT,
    equal,
    logits,
    model_params,
    noise_images,
    one_torch_thread,
    random_classifier,
    weights_of,
)

TINY_TOKENS = {key: value for key, value in TINY_VIT.items() if key != "image_size"}
TINY_DINOV2 = {key: TINY_TOKENS[key] for key in TINY_TOKENS if key != "intermediate_size"}
TINY_TIMM_VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
# The library, the network's name or type, its config, and the layer that computes the scores.
BACKBONES: list[tuple[str, str, dict[str, Any], str]] = [
    ("torchvision", "resnet18", {}, "fc"),
    ("torchvision", "squeezenet1_0", {}, "classifier.1"),
    ("torchvision", "mobilenet_v3_small", {}, "classifier.3"),
    # The layers of this network depend on the version of the weights.
    ("torchvision", "mnasnet0_5", {}, "classifier.1"),
    # This network has more than one output in training.
    ("torchvision", "googlenet", {"init_weights": False}, "fc"),
    ("transformers", "vit", TINY_VIT, "classifier"),
    ("transformers", "convnext", TINY_CONVNEXT, "classifier"),
    ("transformers", "resnet", TINY_RESNET, "classifier.1"),
    # This network has integers among its weights.
    (
        "transformers",
        "swin",
        {"patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        "classifier",
    ),
    # This type has more than one class of networks.
    ("transformers", "deit", TINY_VIT, "classifier"),
    ("transformers", "dinov2", TINY_DINOV2, "classifier"),
    ("transformers", "convnextv2", TINY_CONVNEXT, "classifier"),
    # transformers has no classifiers of these types. Their output is pooled, or begins with a class
    # token, or has neither.
    ("transformers", "dinov3_vit", TINY_TOKENS, "classifier"),
    ("transformers", "internvl_vision", TINY_TOKENS | {"image_size": [SIZE, SIZE]}, "classifier"),
    ("transformers", "sam3_vit_model", TINY_VIT, "classifier"),
    ("timm", "test_resnet", {}, "fc"),
    ("timm", "test_convnext", {}, "head.fc"),
    # This network has several names for one weight.
    ("timm", "coat_lite_tiny", {"embed_dims": [8, 16, 24, 32], "serial_depths": [2] * 4}, "head"),
    ("timm", "vit_tiny_patch16_224", {**TINY_TIMM_VIT, "drop_path_rate": 0.1}, "head"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


def train_one_step(classifier: Classifier) -> None:
    optimizer = torch.optim.SGD(
        [one for one in classifier.network.parameters() if one.requires_grad], lr=1e-4
    )
    outputs = logits_of(classifier.network(noise_images(4)))
    cross_entropy(outputs, torch.tensor([0, 1, 2, 3])).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


@pytest.mark.parametrize(
    ("library", "name", "config", "layer"),
    BACKBONES,
    ids=[f"{one[0]} {one[1]}" for one in BACKBONES],
)
def test_any_backbone_is_trained_frozen_saved_loaded_and_calibrated(
    library: str, name: str, config: dict[str, Any], layer: str, tmp_path: Path
) -> None:
    if library == "transformers":
        settings = model_params("vit", config=config | {"model_type": name}, pretrained=False)
    else:
        if library == "timm":
            pytest.importorskip("timm", reason="timm isn't installed")
        settings = model_params(
            "resnet34", library=library, name=name, config=config, pretrained=False
        )
    classifier = random_classifier(settings)
    start = weights_of(classifier.network)

    classifier.network.train()
    train_one_step(classifier)
    trained = weights_of(classifier.network)
    freeze_backbone(classifier)
    classifier.network.eval()
    train_one_step(classifier)
    before = logits(classifier)
    save_classifier(classifier, settings, tmp_path, "squeeze")
    loaded = load_classifier(tmp_path)

    changed = [key for key in start if not torch.equal(trained[key], start[key])]
    assert len(changed) > len(start) / 2
    last = weights_of(classifier.network)
    changed = [key for key in start if not torch.equal(last[key], trained[key])]
    assert changed == [f"{layer}.weight", f"{layer}.bias"]
    assert equal(weights_of(loaded.network), last)
    torch.testing.assert_close(logits(loaded), before)
    divide_logits(loaded, 1.7)
    torch.testing.assert_close(logits(loaded), before / 1.7)


def test_all_layers_that_compute_the_scores_are_calibrated() -> None:
    """Networks that learned from a teacher average the scores of two layers."""
    config = transformers.DeiTConfig(**TINY_VIT, num_labels=5)
    network = transformers.DeiTForImageClassificationWithTeacher(config)
    classifier = Classifier(network.eval(), [1, 2, 3, 4, 5], SIZE, [0.5] * 3, [0.5] * 3)
    before = logits(classifier)

    divide_logits(classifier, 1.7)

    torch.testing.assert_close(logits(classifier), before / 1.7)


def test_a_network_without_such_a_layer_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no layer with one output for each label"):
        output_layers(nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 6)), 5)
