"""The layers of networks: which there are, which are frozen, and how fast each learns."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from stages.networks import torchvision_models
from stages.networks.classifier import (
    Classifier,
    checkpoint_gradients,
    freeze_first_layers,
    output_layers,
)
from stages.networks.inference import normalizer
from stages.networks.layers import depths_of, layers_of
from stages.runtime.errors import UserError
from stages.training.engine import Trainer, set_training_mode
from stages.training.optimization import learning_rate_scales
from stages.training.processes import synchronize_batch_norm
from tests.builders import (
    SIZE,
    TINY_RESNET,
    TINY_VIT,
    logits,
    make_bins,
    model_params,
    noise_images,
    one_torch_thread,
    random_classifier,
)

LABELS = [1, 2, 3, 4, 5]
# As in larger networks, most of the weights are in the blocks.
TWO_BLOCKS = TINY_VIT | {"num_hidden_layers": 2, "intermediate_size": 512}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


def of_torchvision(name: str) -> nn.Module:
    with torch.device("meta"):
        return torchvision_models._network(name, LABELS, {})


def of_transformers(model_type: str, **config: Any) -> nn.Module:
    settings = transformers.AutoConfig.for_model(model_type, num_labels=len(LABELS), **config)
    with torch.device("meta"):
        network: nn.Module = transformers.AutoModelForImageClassification.from_config(settings)
    return network


def of_timm(name: str) -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm isn't installed")
    with torch.device("meta"):
        network: nn.Module = timm.create_model(name, num_classes=len(LABELS))
    return network


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        (of_torchvision("resnet18"), [f"layer{number}" for number in range(1, 5)]),
        (of_torchvision("resnet34"), [f"layer{number}" for number in range(1, 5)]),
        (of_torchvision("efficientnet_b0"), [f"features.{number}" for number in range(9)]),
        (of_torchvision("convnext_tiny"), [f"features.{number}" for number in range(8)]),
        (
            of_torchvision("vit_b_16"),
            [f"encoder.layers.encoder_layer_{number}" for number in range(12)],
        ),
        # Most of its weights are in the head, which has no layers of its own.
        (of_torchvision("vgg11"), ["features", "classifier"]),
        (of_torchvision("mobilenet_v3_small"), [f"features.{number}" for number in range(13)]),
        (of_transformers("vit"), [f"vit.layers.{number}" for number in range(12)]),
        (of_transformers("swin"), [f"swin.encoder.layers.{number}" for number in range(4)]),
    ],
)
def test_the_layers_of_known_networks_are_found(network: nn.Module, layers: list[str]) -> None:
    check_layers(network, layers)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", [f"layer{number}" for number in range(1, 5)]),
        ("tf_efficientnet_lite0", [f"blocks.{number}" for number in range(7)]),
        # Its first batch normalization contains an activation.
        ("mobilenetv3_small_100", [f"blocks.{number}" for number in range(6)]),
        ("vit_tiny_patch16_224", [f"blocks.{number}" for number in range(12)]),
        ("convnext_tiny", [f"stages.{number}" for number in range(4)]),
        # The batch normalization after its first layer is part of that.
        ("resnet18d", ["conv1", *(f"layer{number}" for number in range(1, 5))]),
        # The scores are computed in its last layer.
        ("hgnetv2_b0", ["stem", "stages", "head"]),
    ],
)
def test_the_layers_of_networks_of_timm_are_found(name: str, layers: list[str]) -> None:
    check_layers(of_timm(name), layers)


def check_layers(network: nn.Module, layers: list[str]) -> None:
    outputs = output_layers(network, len(LABELS))
    found = layers_of(network, outputs)

    assert [*found] == layers
    depths = depths_of(network, found, outputs)
    assert [*depths.values()] == sorted(depths.values())
    scores = {id(parameter) for layer in outputs for parameter in layer.parameters()}
    for name, parameter in network.named_parameters():
        own = [number for number, one in enumerate(layers, 1) if name.startswith(f"{one}.")]
        if id(parameter) in scores:
            own = [len(layers) + 1]
        assert not own or depths[name] == own[0]
    assert set(depths.values()) >= set(range(1, len(layers) + 1))


def two_blocks(**settings: Any) -> Classifier:
    config = settings.pop("config", TWO_BLOCKS)
    return random_classifier(model_params("vit", config=config, pretrained=False, **settings))


def trained_names(classifier: Classifier) -> set[str]:
    return {name for name, one in classifier.network.named_parameters() if one.requires_grad}


def test_the_layers_of_a_network_with_a_head_of_our_own_are_found() -> None:
    network = two_blocks(config=TWO_BLOCKS | {"model_type": "dinov3_vit"}).network

    check_layers(network, [f"backbone.model.layer.{number}" for number in range(2)])


def test_the_first_layers_and_what_is_before_them_are_frozen() -> None:
    classifier = two_blocks()

    freeze_first_layers(classifier, 1)

    names = trained_names(classifier)
    assert {name.split(".")[0] for name in names} == {"vit", "classifier"}
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"1"}
    assert not any("embeddings" in name for name in names)


def test_more_layers_than_there_are_cannot_be_frozen() -> None:
    with pytest.raises(UserError, match=r"^freeze is 3, but the network has 2 layers \(vit\."):
        freeze_first_layers(two_blocks(), 3)


def test_the_statistics_of_frozen_layers_stay_and_those_of_others_change() -> None:
    settings = model_params("vit", config=TINY_RESNET, pretrained=False, freeze=1)
    classifier = random_classifier(settings)
    freeze_first_layers(classifier, 1)
    before = {name: one.clone() for name, one in classifier.network.named_buffers()}

    set_training_mode(classifier.network, settings)
    classifier.network(noise_images(4))

    changed = {
        name
        for name, one in classifier.network.named_buffers()
        if name.endswith("running_mean") and not torch.equal(one, before[name])
    }
    assert changed
    assert all(".stages.1." in name for name in changed)


def test_the_learning_rate_decays_towards_the_stem_and_the_head_has_its_own() -> None:
    settings = model_params(
        "vit", layer_decay=0.5, learning_rate=1e-3, head_learning_rate=1e-2, pretrained=False
    )

    scales = learning_rate_scales(two_blocks(), settings)

    of_block = {name.split(".")[2]: scale for name, scale in scales.items() if ".layers." in name}
    assert of_block == {"0": 0.25, "1": 0.5}
    assert {scale for name, scale in scales.items() if "embeddings" in name} == {0.125}
    assert scales["vit.layernorm.weight"] == 1
    assert scales["classifier.weight"] == scales["classifier.bias"] == pytest.approx(10)


def test_all_parameters_learn_at_one_rate_if_nothing_else_is_said() -> None:
    assert set(learning_rate_scales(two_blocks(), model_params("vit")).values()) == {1}


def gradients(classifier: Classifier) -> list[torch.Tensor]:
    classifier.network.train().zero_grad()
    classifier.logits(noise_images()).square().sum().backward()  # type: ignore[no-untyped-call]
    return [one.grad for one in classifier.network.parameters() if one.grad is not None]


@pytest.mark.parametrize(
    "config",
    # Without the random scale that positions of DINOv3 have in training.
    [{}, {"model_type": "dinov3_vit", "pos_embed_rescale": None}],
)
def test_gradients_from_recomputed_activations_are_the_same(config: dict[str, Any]) -> None:
    classifier = two_blocks(config=TWO_BLOCKS | config)
    before = gradients(classifier)

    checkpoint_gradients(classifier.network)

    after = gradients(classifier)
    assert any(
        getattr(module, "gradient_checkpointing", False) for module in classifier.network.modules()
    )
    assert len(before) == len(after)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_recomputed_activations_would_count_batches_twice_in_batch_normalization(
    tmp_path: Path,
) -> None:
    bins = make_bins(tmp_path, [1, 2, 3, 4])
    settings = model_params(
        "vit", config=TINY_RESNET, pretrained=False, checkpoint_gradients=True, batch_size=4
    )

    with pytest.raises(UserError, match=r"^checkpoint_gradients computes layers twice, so batch"):
        Trainer(random_classifier(settings), bins, bins, settings, 4)


def test_a_network_of_timm_that_cannot_recompute_activations_says_so() -> None:
    with pytest.raises(UserError, match=r"^checkpoint_gradients: "):
        checkpoint_gradients(of_timm("vgg11"))


def test_synchronized_batch_normalization_of_timm_keeps_its_activation() -> None:
    timm = pytest.importorskip("timm", reason="timm isn't installed")
    network = timm.create_model("mobilenetv3_small_050", num_classes=5).eval()
    images = noise_images()
    with torch.inference_mode():
        before = network(images)

    synchronize_batch_norm(network)

    assert any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
    with torch.inference_mode():
        torch.testing.assert_close(network(images), before)


def test_networks_of_torchvision_cannot_recompute_activations() -> None:
    with pytest.raises(UserError, match=r"^checkpoint_gradients is true, but"):
        checkpoint_gradients(of_torchvision("resnet18"))


def test_an_image_and_its_mirror_image_get_the_same_scores() -> None:
    classifier = replace(two_blocks(), average_mirrored=True)
    classifier.network.eval()
    images = noise_images()

    with torch.inference_mode():
        found, mirrored = classifier.logits(images), classifier.logits(images.flip(3))

    torch.testing.assert_close(found, mirrored)
    assert not torch.allclose(found, logits(replace(classifier, average_mirrored=False)))


def test_a_network_sees_its_images_scaled_to_its_size() -> None:
    classifier = two_blocks()
    small = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    # Every pixel twice in both directions.
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)

    found = normalizer(classifier)(large)

    assert found.shape == small.shape
    # Interpolation also looks a little beyond the two pixels.
    assert (found - normalizer(classifier)(small)).abs().mean() < 0.5
    constant = torch.full_like(large, 0.3)
    expected = normalizer(classifier)(torch.full_like(small, 0.3))
    torch.testing.assert_close(normalizer(classifier)(constant), expected)
