"""Building, saving and loading networks of both libraries."""

import json
from collections.abc import Callable, Iterator
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

from stages.imaging import jpeg
from stages.networks.classifier import (
    Classifier,
    build_classifier,
    load_classifier,
    save_classifier,
)
from stages.networks.inference import normalizer
from stages.networks.model_files import record_source
from stages.runtime.errors import UserError
from stages.runtime.params import Model
from tests.made import (
    SIZE,
    TINY_CONVNEXT,
    TINY_RESNET,
    TINY_VIT,
    equal,
    logits,
    model_knobs,
    noise_images,
    one_torch_thread,
    random_classifier,
    weights_of,
)

LABELS = [1, 2, 3, 4, 5]
TINY_PVT = {
    "model_type": "pvt",
    "num_encoder_blocks": 1,
    "depths": [1],
    "sequence_reduction_ratios": [1],
    "hidden_sizes": [8],
    "patch_sizes": [4],
    "strides": [4],
    "num_attention_heads": [1],
    "mlp_ratios": [1],
}
MOBILENET = model_knobs("resnet34", name="mobilenet_v3_small", pretrained=False)
VIT = model_knobs("vit", config=TINY_VIT, pretrained=False)
CONVNEXT = model_knobs("vit", config=TINY_CONVNEXT, pretrained=False)
PRETRAINED_MOBILENET = model_knobs("resnet34", name="mobilenet_v3_small")
PRETRAINED_VIT = model_knobs("vit", name="someone/vit")
PRETRAINED_RESNET = model_knobs("vit", config={"model_type": "resnet"})
every_network = pytest.mark.parametrize(
    "knobs", [MOBILENET, VIT, CONVNEXT], ids=["mobilenet", "vit", "convnext"]
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


def saved(classifier: Classifier, knobs: Model, folder: Path) -> Path:
    folder.mkdir()
    save_classifier(classifier, knobs, folder)
    return folder


def same_weights(some: nn.Module, others: nn.Module) -> bool:
    return equal(weights_of(some), weights_of(others))


def pretrained_vit(folder: Path) -> dict[str, Tensor]:
    config = transformers.ViTConfig(**TINY_VIT, num_labels=7)
    network = transformers.ViTForImageClassification(config)
    network.save_pretrained(folder)
    record_source(folder, "here")
    return weights_of(network)


def pretrained_headless_vit(folder: Path) -> dict[str, Tensor]:
    network = transformers.ViTModel(transformers.ViTConfig(**TINY_VIT))
    network.save_pretrained(folder)
    record_source(folder, "here")
    return weights_of(network)


def pretrained_resnet(folder: Path) -> dict[str, Tensor]:
    """With a head for seven classes, and without the counts that old weights do not have."""
    network = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(**TINY_RESNET, num_labels=7)
    )
    network.save_pretrained(folder)
    weights = without_counts(weights_of(network))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    record_source(folder, "here")
    return weights


def without_counts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")
    }


def pretrained_mobilenet(folder: Path) -> dict[str, Tensor]:
    network = torchvision.models.mobilenet_v3_small(num_classes=7)
    save_file(network.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    record_source(folder, "here")
    return weights_of(network)


@pytest.mark.parametrize(
    ("make", "knobs", "prefix", "head"),
    [
        (pretrained_mobilenet, PRETRAINED_MOBILENET, "", "classifier.3"),
        (pretrained_vit, PRETRAINED_VIT, "", "classifier"),
        (pretrained_headless_vit, PRETRAINED_VIT, "vit.", "classifier"),
        (pretrained_resnet, PRETRAINED_RESNET, "", "classifier.1"),
    ],
)
def test_all_but_the_last_layer_comes_from_the_pretrained_weights(
    make: Callable[[Path], dict[str, Tensor]],
    knobs: Model,
    prefix: str,
    head: str,
    tmp_path: Path,
) -> None:
    torch.manual_seed(7)
    pretrained = make(tmp_path)
    torch.manual_seed(0)

    classifier = build_classifier(knobs, tmp_path, LABELS, SIZE)

    kept = {prefix + key: weight for key, weight in pretrained.items()}
    weights = without_counts(classifier.network.state_dict())
    of_head = {f"{head}.weight", f"{head}.bias"}
    assert weights[f"{head}.weight"].shape[0] == len(LABELS)
    assert weights[f"{head}.bias"].shape == (len(LABELS),)
    for key in weights.keys() - of_head:
        assert torch.equal(weights[key], kept[key]), key
    assert logits(classifier).shape == (2, len(LABELS))


def test_old_weights_without_counts_of_batches_will_do(tmp_path: Path) -> None:
    torch.manual_seed(7)
    weights = without_counts(pretrained_mobilenet(tmp_path))
    save_file(weights, tmp_path / "model.safetensors")
    record_source(tmp_path, "here")

    network = build_classifier(PRETRAINED_MOBILENET, tmp_path, LABELS, SIZE).network

    assert torch.equal(weights_of(network)["features.0.1.weight"], weights["features.0.1.weight"])
    assert weights_of(network)["features.0.1.num_batches_tracked"] == 0


def test_a_head_for_as_many_labels_is_kept(tmp_path: Path) -> None:
    pretrained = pretrained_vit(tmp_path)

    network = build_classifier(PRETRAINED_VIT, tmp_path, [1, 2, 3, 4, 5, 6, 7], SIZE).network

    assert equal(weights_of(network), pretrained)


@pytest.mark.parametrize(
    ("config", "parameter"),
    [
        ({"intermediate_size": 48}, r"vit\.\S+ of the shape \[48\]"),
        ({"num_hidden_layers": 2}, r"vit\.\S+\.1\.\S+ of the shape"),
        (
            {"image_size": 2 * SIZE},
            r"vit\.embeddings\.position_embeddings of the shape \[1, 65, 16\]",
        ),
    ],
    ids=str,
)
def test_a_config_that_the_vits_weights_are_not_of_names_a_parameter(
    config: dict[str, Any], parameter: str, tmp_path: Path
) -> None:
    pretrained_vit(tmp_path)
    knobs = model_knobs("vit", config={"model_type": "vit"} | config)

    with pytest.raises(UserError, match=f"its weights have no {parameter}"):
        build_classifier(knobs, tmp_path, LABELS, SIZE)


def test_a_config_that_torchvisions_weights_are_not_of_names_a_parameter(tmp_path: Path) -> None:
    pretrained_mobilenet(tmp_path)
    knobs = PRETRAINED_MOBILENET.model_copy(update={"config": {"reduced_tail": True}})

    with pytest.raises(UserError, match=r"its weights have no \S+ of the shape \["):
        build_classifier(knobs, tmp_path, LABELS, SIZE)


def test_a_config_that_changes_no_parameter_is_taken(tmp_path: Path) -> None:
    pretrained_vit(tmp_path)
    config = {"model_type": "vit", "hidden_dropout_prob": 0.25}

    network = build_classifier(model_knobs("vit", config=config), tmp_path, LABELS, SIZE).network

    dropouts = {one.p for one in network.modules() if isinstance(one, nn.Dropout)}
    assert 0.25 in dropouts


def test_weights_of_another_model_type_are_a_user_error(tmp_path: Path) -> None:
    pretrained_vit(tmp_path)

    with pytest.raises(UserError, match="its weights are of the model_type vit"):
        build_classifier(model_knobs("vit", config={"model_type": "deit"}), tmp_path, LABELS, SIZE)


def test_a_pretrained_network_starts_its_last_layer_by_torchs_seed(tmp_path: Path) -> None:
    pretrained_vit(tmp_path)

    def start(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return build_classifier(model_knobs("vit"), tmp_path, LABELS, SIZE).network

    assert same_weights(start(3), start(3))
    assert not same_weights(start(3), start(4))


@every_network
def test_a_random_start_follows_torchs_seed(knobs: Model) -> None:
    first, again, other = (random_classifier(knobs, seed=seed).network for seed in (3, 3, 4))

    assert same_weights(first, again)
    assert not same_weights(first, other)


@every_network
def test_what_was_saved_is_loaded_with_all_that_is_needed_to_use_it(
    knobs: Model, tmp_path: Path
) -> None:
    classifier = random_classifier(knobs, labels=[1, 3, 10])
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
    first = saved(random_classifier(knobs), knobs, tmp_path / "first")
    second = saved(random_classifier(knobs), knobs, tmp_path / "second")

    files = {path.name: path.read_bytes() for path in first.iterdir()}
    assert files == {path.name: path.read_bytes() for path in second.iterdir()}
    assert files.keys() >= {"config.json", "model.safetensors", "preprocessor_config.json"}


@every_network
def test_weights_in_channels_last_are_saved_in_the_usual_order(
    knobs: Model, tmp_path: Path
) -> None:
    first = saved(random_classifier(knobs), knobs, tmp_path / "first")
    classifier = random_classifier(knobs)
    classifier.network.to(memory_format=torch.channels_last)
    second = saved(classifier, knobs, tmp_path / "second")

    name = "model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_random_vit_is_built_for_the_size_of_the_photographs() -> None:
    config = {key: value for key, value in TINY_VIT.items() if key != "image_size"}
    network = random_classifier(model_knobs("vit", config=config, pretrained=False)).network

    assert isinstance(network, transformers.PreTrainedModel)
    assert network.config.image_size == SIZE


@pytest.mark.parametrize("knobs", [VIT, CONVNEXT], ids=["vit", "convnext"])
def test_transformers_loads_a_saved_model_by_itself(knobs: Model, tmp_path: Path) -> None:
    classifier = random_classifier(knobs)
    before = logits(classifier)
    folder = saved(classifier, knobs, tmp_path / "model")

    network = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()

    assert network.config.id2label == {0: "1", 1: "2", 2: "3", 3: "4", 4: "5"}
    assert network.config.label2id == {"1": 0, "2": 1, "3": 2, "4": 3, "5": 4}
    with torch.inference_mode():
        assert torch.equal(network(noise_images()).logits, before)


@pytest.mark.parametrize("knobs", [VIT, CONVNEXT], ids=["vit", "convnext"])
@pytest.mark.parametrize("shape", [(SIZE, SIZE, 3), (75, 50, 3)], ids=["resized", "original"])
def test_transformers_prepares_images_as_the_pipeline_does(
    knobs: Model, shape: tuple[int, ...], tmp_path: Path
) -> None:
    classifier = random_classifier(knobs.model_copy(update={"mean": [0.53, 0.45, 0.36]}))
    folder = saved(classifier, knobs, tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    prepared = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]

    resized = pixels if shape == (SIZE, SIZE, 3) else jpeg.resize(pixels, SIZE, "squeeze")
    expected = normalizer(classifier)(torch.from_numpy(resized).permute(2, 0, 1)[None] / 255)
    # Resizing rounds to whole values, of which one is 1 / 255 / 0.5.
    tolerance = 1e-5 if resized is pixels else 0.008
    torch.testing.assert_close(prepared, expected, rtol=0, atol=tolerance)


def test_torchvision_loads_a_saved_resnet34_strictly(tmp_path: Path) -> None:
    knobs = model_knobs("resnet34", pretrained=False)
    classifier = random_classifier(knobs)
    before = logits(classifier)
    folder = saved(classifier, knobs, tmp_path / "model")

    network = torchvision.models.resnet34(num_classes=5)
    network.load_state_dict(load_file(folder / "model.safetensors"), strict=True)

    with torch.inference_mode():
        assert torch.equal(network.eval()(noise_images()), before)
    config = json.loads((folder / "config.json").read_text())
    assert config["name"] == "resnet34"
    assert config["id2label"] == {"0": "1", "1": "2", "2": "3", "3": "4", "4": "5"}


def test_a_torchvision_networks_config_is_built_and_comes_back(tmp_path: Path) -> None:
    knobs = model_knobs(
        "resnet34", name="squeezenet1_1", config={"dropout": 0.125}, pretrained=False
    )
    folder = saved(random_classifier(knobs), knobs, tmp_path / "model")

    dropouts = [
        module.p
        for module in load_classifier(folder).network.modules()
        if isinstance(module, nn.Dropout)
    ]

    assert dropouts == [0.125]


@pytest.mark.parametrize(
    ("model", "config", "reason"),
    [
        ("resnet34", {"no_such_key": 1}, "no_such_key"),
        ("resnet34", {"num_classes": 3}, "num_classes"),
        ("resnet34", {"groups": 2}, "groups=1"),
        ("vit", {"model_type": "no-such-type"}, "no-such-type"),
        ("vit", TINY_VIT | {"id2label": {"0": "1"}}, "its config has no id2label to set"),
        (
            "vit",
            TINY_VIT | {"num_labels": 3, "label2id": {"1": 0}},
            "its config has no label2id, num_labels to set",
        ),
        ("vit", TINY_VIT | {"hiden_size": 16}, "its config has no hiden_size to set"),
        ("vit", TINY_VIT | {"hidden_size": "sixteen"}, "hidden_size"),
        ("vit", TINY_VIT | {"num_attention_heads": 0}, "zero"),
        ("vit", TINY_VIT | {"hidden_act": "no-such-act"}, "no-such-act"),
        ("vit", TINY_VIT | {"image_size": 2 * SIZE}, "64"),
        ("vit", TINY_VIT | {"num_channels": 1}, "channel"),
        ("vit", TINY_CONVNEXT | {"hidden_sizes": [8, -1]}, "negative dimension"),
        ("vit", {"model_type": "bert"}, "BertConfig"),
        # It takes no number of labels.
        ("vit", TINY_PVT, r"it gives \[1, 1000\], not a score for each of \[1, 2, 3, 4, 5\]"),
    ],
    ids=str,
)
def test_a_config_that_the_library_cannot_build_is_a_user_error(
    model: str, config: dict[str, Any], reason: str
) -> None:
    knobs = model_knobs(model, config=config, pretrained=False)
    text = f"{knobs.library} cannot build {knobs.name} with this model's name, config and"

    with pytest.raises(UserError, match=rf"(?s)^{text} resize\.size: .*{reason}") as error:
        random_classifier(knobs)

    assert "\n" not in str(error.value)


def test_a_network_that_fails_only_in_training_is_a_user_error() -> None:
    # Its second head has no room left in images of this size.
    knobs = model_knobs(
        "resnet34", name="inception_v3", config={"init_weights": False}, pretrained=False
    )

    with pytest.raises(UserError, match="cannot build inception_v3"):
        build_classifier(knobs, Path("nowhere"), LABELS, 80)


def test_trying_a_network_leaves_it_as_it_was_made(tmp_path: Path) -> None:
    pretrained = pretrained_mobilenet(tmp_path)

    network = build_classifier(PRETRAINED_MOBILENET, tmp_path, LABELS, SIZE).network

    # In training its statistics would have changed.
    statistics = {name for name in pretrained if "running" in name or "num_batches" in name}
    assert len(statistics) > 30
    weights = weights_of(network)
    assert all(torch.equal(weights[name], pretrained[name]) for name in statistics)


def test_a_name_that_torchvision_lacks_is_a_user_error() -> None:
    with pytest.raises(UserError, match="torchvision cannot build resnet3400"):
        random_classifier(model_knobs("resnet34", name="resnet3400", pretrained=False))


def test_pretrained_weights_for_another_size_are_a_user_error(tmp_path: Path) -> None:
    pretrained_vit(tmp_path)

    with pytest.raises(UserError, match=rf"resize\.size: .*64.*{SIZE}"):
        build_classifier(model_knobs("vit"), tmp_path, LABELS, 64)


def test_pretrained_weights_for_any_size_are_taken(tmp_path: Path) -> None:
    config = transformers.ConvNextConfig(**TINY_CONVNEXT, image_size=224)
    transformers.ConvNextForImageClassification(config).save_pretrained(tmp_path)
    record_source(tmp_path, "here")

    knobs = model_knobs("vit", config={"model_type": "convnext"})

    assert logits(build_classifier(knobs, tmp_path, LABELS, SIZE)).shape == (2, len(LABELS))
