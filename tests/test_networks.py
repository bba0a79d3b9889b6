"""Building, saving and loading networks of both libraries."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.core import engine, jpeg
from stages.core.command import UserError
from stages.core.networks import Classifier, build_classifier, load_classifier, save_classifier
from stages.core.params import Model
from tests.made import SIZE, TINY_VIT, model_knobs

LABELS = [1, 2, 3, 4, 5]
TINY_CONVNEXT = {
    "model_type": "convnext",
    "num_stages": 2,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
}
MOBILENET = model_knobs("resnet34", name="mobilenet_v3_small", pretrained=False)
VIT = model_knobs("vit", config=TINY_VIT, pretrained=False)
CONVNEXT = model_knobs("vit", config=TINY_CONVNEXT, pretrained=False)
every_network = pytest.mark.parametrize(
    "knobs", [MOBILENET, VIT, CONVNEXT], ids=["mobilenet", "vit", "convnext"]
)


def build(knobs: Model, labels: list[int] = LABELS, seed: int = 0) -> Classifier:
    """On random weights: there is no folder of pretrained ones."""
    torch.manual_seed(seed)
    return build_classifier(knobs, Path("nowhere"), labels, SIZE)


def saved(classifier: Classifier, knobs: Model, folder: Path) -> Path:
    folder.mkdir()
    save_classifier(classifier, knobs, folder)
    return folder


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def logits(classifier: Classifier) -> Tensor:
    classifier.network.eval()
    with torch.inference_mode():
        return classifier.logits(images())


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = network.state_dict()
    return weights


def same_weights(some: nn.Module, others: nn.Module) -> bool:
    weights, other_weights = some.state_dict(), others.state_dict()
    return weights.keys() == other_weights.keys() and all(
        torch.equal(weight, other_weights[name]) for name, weight in weights.items()
    )


def pretrained_vit(folder: Path) -> dict[str, Tensor]:
    config = transformers.ViTConfig(**TINY_VIT, num_labels=7)
    network = transformers.ViTForImageClassification(config)
    network.save_pretrained(folder)
    return weights_of(network)


def pretrained_headless_vit(folder: Path) -> dict[str, Tensor]:
    network = transformers.ViTModel(transformers.ViTConfig(**TINY_VIT))
    network.save_pretrained(folder)
    return weights_of(network)


def pretrained_mobilenet(folder: Path) -> dict[str, Tensor]:
    network = torchvision.models.mobilenet_v3_small(num_classes=7)
    save_file(network.state_dict(), folder / "model.safetensors")
    return weights_of(network)


@pytest.mark.parametrize(
    ("make", "model", "name", "prefix", "last_layer"),
    [
        (pretrained_mobilenet, "resnet34", "mobilenet_v3_small", "", "classifier.3"),
        (pretrained_vit, "vit", "someone/vit", "", "classifier"),
        (pretrained_headless_vit, "vit", "someone/vit", "vit.", "classifier"),
    ],
)
def test_all_but_the_last_layer_comes_from_the_pretrained_weights(
    make: Callable[[Path], dict[str, Tensor]],
    model: str,
    name: str,
    prefix: str,
    last_layer: str,
    tmp_path: Path,
) -> None:
    torch.manual_seed(7)
    pretrained = make(tmp_path)
    torch.manual_seed(0)

    classifier = build_classifier(model_knobs(model, name=name), tmp_path, LABELS, SIZE)

    kept = {prefix + key: weight for key, weight in pretrained.items()}
    weights = classifier.network.state_dict()
    head = {f"{last_layer}.weight", f"{last_layer}.bias"}
    assert weights[f"{last_layer}.weight"].shape[0] == len(LABELS)
    assert weights[f"{last_layer}.bias"].shape == (len(LABELS),)
    assert head <= weights.keys()
    for key in weights.keys() - head:
        assert torch.equal(weights[key], kept[key]), key
    assert logits(classifier).shape == (2, len(LABELS))


def test_a_pretrained_network_starts_its_last_layer_by_torchs_seed(tmp_path: Path) -> None:
    pretrained_vit(tmp_path)

    def start(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return build_classifier(model_knobs("vit"), tmp_path, LABELS, SIZE).network

    assert same_weights(start(3), start(3))
    assert not same_weights(start(3), start(4))


@every_network
def test_a_random_start_follows_torchs_seed(knobs: Model) -> None:
    assert same_weights(build(knobs, seed=3).network, build(knobs, seed=3).network)
    assert not same_weights(build(knobs, seed=3).network, build(knobs, seed=4).network)


@every_network
def test_what_was_saved_is_loaded_with_all_that_is_needed_to_use_it(
    knobs: Model, tmp_path: Path
) -> None:
    classifier = build(knobs, labels=[1, 3, 10])
    before = logits(classifier)
    folder = saved(classifier, knobs, tmp_path / "model")

    loaded = load_classifier(folder)

    assert before.shape == (2, 3)
    assert not loaded.network.training
    assert torch.equal(logits(loaded), before)
    assert loaded.labels == [1, 3, 10]
    assert (loaded.size, loaded.mean, loaded.std) == (SIZE, knobs.mean, knobs.std)


@every_network
def test_saving_twice_gives_the_same_bytes(knobs: Model, tmp_path: Path) -> None:
    first = saved(build(knobs), knobs, tmp_path / "first")
    second = saved(build(knobs), knobs, tmp_path / "second")

    files = {path.name: path.read_bytes() for path in first.iterdir()}
    assert files == {path.name: path.read_bytes() for path in second.iterdir()}
    assert files.keys() >= {"config.json", "model.safetensors", "preprocessor_config.json"}


@every_network
def test_weights_in_channels_last_are_saved_in_the_usual_order(
    knobs: Model, tmp_path: Path
) -> None:
    first = saved(build(knobs), knobs, tmp_path / "first")
    classifier = build(knobs)
    classifier.network.to(memory_format=torch.channels_last)
    second = saved(classifier, knobs, tmp_path / "second")

    name = "model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_random_vit_is_built_for_the_size_of_the_photographs() -> None:
    config = {key: value for key, value in TINY_VIT.items() if key != "image_size"}
    network = build(model_knobs("vit", config=config, pretrained=False)).network

    assert isinstance(network, transformers.PreTrainedModel)
    assert network.config.image_size == SIZE


@pytest.mark.parametrize("knobs", [VIT, CONVNEXT], ids=["vit", "convnext"])
def test_transformers_loads_a_saved_model_by_itself(knobs: Model, tmp_path: Path) -> None:
    classifier = build(knobs)
    before = logits(classifier)
    folder = saved(classifier, knobs, tmp_path / "model")

    network = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()

    assert network.config.id2label == {0: "1", 1: "2", 2: "3", 3: "4", 4: "5"}
    assert network.config.label2id == {"1": 0, "2": 1, "3": 2, "4": 3, "5": 4}
    with torch.inference_mode():
        assert torch.equal(network(images()).logits, before)


@pytest.mark.parametrize("knobs", [VIT, CONVNEXT], ids=["vit", "convnext"])
@pytest.mark.parametrize("shape", [(SIZE, SIZE, 3), (75, 50, 3)], ids=["resized", "original"])
def test_transformers_prepares_images_as_the_pipeline_does(
    knobs: Model, shape: tuple[int, ...], tmp_path: Path
) -> None:
    classifier = build(knobs.model_copy(update={"mean": [0.53, 0.45, 0.36]}))
    folder = saved(classifier, knobs, tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    prepared = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]

    resized = pixels if shape == (SIZE, SIZE, 3) else jpeg.resize(pixels, SIZE, "squeeze")
    expected = engine.normalize(torch.from_numpy(resized).permute(2, 0, 1)[None], classifier)
    # Resizing rounds to whole values, of which one is 1 / 255 / 0.5.
    tolerance = 1e-5 if resized is pixels else 0.008
    torch.testing.assert_close(prepared, expected, rtol=0, atol=tolerance)


def test_torchvision_loads_a_saved_resnet34_strictly(tmp_path: Path) -> None:
    knobs = model_knobs("resnet34", pretrained=False)
    classifier = build(knobs)
    before = logits(classifier)
    folder = saved(classifier, knobs, tmp_path / "model")

    network = torchvision.models.resnet34(num_classes=5)
    network.load_state_dict(load_file(folder / "model.safetensors"), strict=True)

    with torch.inference_mode():
        assert torch.equal(network.eval()(images()), before)
    config = json.loads((folder / "config.json").read_text())
    assert config["name"] == "resnet34"
    assert config["id2label"] == {"0": "1", "1": "2", "2": "3", "3": "4", "4": "5"}


def test_a_torchvision_networks_config_is_built_and_comes_back(tmp_path: Path) -> None:
    knobs = model_knobs(
        "resnet34", name="squeezenet1_1", config={"dropout": 0.125}, pretrained=False
    )
    folder = saved(build(knobs), knobs, tmp_path / "model")

    dropouts = [
        module.p
        for module in load_classifier(folder).network.modules()
        if isinstance(module, nn.Dropout)
    ]

    assert dropouts == [0.125]


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("resnet34", {"no_such_key": 1}),
        ("resnet34", {"num_classes": 3}),
        ("vit", {}),
        ("vit", {"model_type": "no-such-type"}),
        ("vit", TINY_VIT | {"id2label": {0: "1"}}),
        ("vit", TINY_VIT | {"hiden_size": 16}),
        ("vit", TINY_VIT | {"hidden_size": "sixteen"}),
    ],
)
def test_a_config_that_the_library_cannot_build_is_a_user_error(
    model: str, config: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="cannot build"):
        build(model_knobs(model, config=config, pretrained=False))


def test_a_name_that_torchvision_lacks_is_a_user_error() -> None:
    with pytest.raises(UserError, match="torchvision cannot build resnet3400"):
        build(model_knobs("resnet34", name="resnet3400", pretrained=False))


def test_pretrained_weights_for_another_size_are_a_user_error(tmp_path: Path) -> None:
    pretrained_vit(tmp_path)

    with pytest.raises(UserError, match=f"resize.size is 64, its weights are for {SIZE}"):
        build_classifier(model_knobs("vit"), tmp_path, LABELS, 64)
