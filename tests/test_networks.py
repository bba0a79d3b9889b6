"""Building, saving and loading networks of all libraries."""

import errno
import importlib.util
import json
import operator
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import transformers
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.imaging import jpeg
from stages.networks.classifier import (
    Classifier,
    build_classifier,
    load_classifier,
    output_layers,
    save_classifier,
)
from stages.networks.inference import normalizer
from stages.networks.libraries import library_of
from stages.networks.pretrained import record_source
from stages.runtime.errors import UserError
from stages.runtime.params import ModelParams
from tests.builders import (
    REPOSITORY,
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

LABELS = [1, 2, 3, 4, 5]
MOBILENET = model_params("resnet34", name="mobilenet_v3_small", pretrained=False)
VIT = model_params("vit", config=TINY_VIT, pretrained=False)
CONVNEXT = model_params("vit", config=TINY_CONVNEXT, pretrained=False)
DINOV3 = model_params("vit", config=TINY_VIT | {"model_type": "dinov3_vit"}, pretrained=False)
TIMM = model_params("resnet34", library="timm", name="test_vit", pretrained=False)
NETWORKS = {"mobilenet": MOBILENET, "vit": VIT, "convnext": CONVNEXT, "dinov3": DINOV3}
if importlib.util.find_spec("timm"):
    NETWORKS["timm"] = TIMM
with_timm = pytest.mark.skipif("timm" not in NETWORKS, reason="timm isn't installed")
PRETRAINED_MOBILENET = model_params("resnet34", name="mobilenet_v3_small")
PRETRAINED_VIT = model_params("vit", name="someone/vit")
PRETRAINED_DINOV3 = model_params("vit", config={"model_type": "dinov3_vit"})
PRETRAINED_TIMM = model_params("resnet34", library="timm", name="test_vit")
PRETRAINED_RESNET = model_params("vit", config={"model_type": "resnet"})
every_network = pytest.mark.parametrize("name", NETWORKS)
Weights = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


def without_counts(weights: Weights) -> Weights:
    return {
        name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")
    }


def pretrained_vit(folder: Path) -> Weights:
    config = transformers.ViTConfig(**TINY_VIT, num_labels=7)
    return saved_weights(transformers.ViTForImageClassification(config), folder)


def pretrained_headless_vit(folder: Path) -> Weights:
    weights = saved_weights(transformers.ViTModel(transformers.ViTConfig(**TINY_VIT)), folder)
    return {f"vit.{name}": value for name, value in weights.items()}


def pretrained_resnet(folder: Path) -> Weights:
    config = transformers.ResNetConfig(**TINY_RESNET, num_labels=7)
    return saved_weights(transformers.ResNetForImageClassification(config), folder)


def pretrained_mobilenet(folder: Path) -> Weights:
    network = torchvision.models.mobilenet_v3_small(num_classes=7)
    (folder / "config.json").write_text("{}")
    return saved_weights(network, folder)


def pretrained_dinov3(folder: Path) -> Weights:
    config = transformers.DINOv3ViTConfig(**without_type(TINY_VIT))
    weights = saved_weights(transformers.DINOv3ViTModel(config), folder)
    return {f"backbone.{name}": value for name, value in weights.items()}


def without_type(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "model_type"}


def pretrained_timm(folder: Path, classes: int = 7) -> Weights:
    timm = importlib.import_module("timm")
    (folder / "config.json").write_text("{}")
    return saved_weights(timm.create_model("test_vit", num_classes=classes, img_size=SIZE), folder)


def pretrained_headless_timm(folder: Path) -> Weights:
    return pretrained_timm(folder, classes=0)


def pretrained_dla(folder: Path) -> Weights:
    """timm itself would load such weights even if layers were missing."""
    timm = importlib.import_module("timm")
    (folder / "config.json").write_text("{}")
    return saved_weights(timm.create_model("dla46x_c", num_classes=7), folder)


def saved_weights(network: Any, folder: Path) -> Weights:
    """Remove the counters of batch normalization, which old weights lack."""
    if isinstance(network, transformers.PreTrainedModel):
        network.save_pretrained(folder)
    weights = without_counts(weights_of(network))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    record_source(folder, "here")
    return weights


@pytest.mark.parametrize(
    ("make", "settings", "head"),
    [
        (pretrained_mobilenet, PRETRAINED_MOBILENET, "classifier.3"),
        (pretrained_vit, PRETRAINED_VIT, "classifier"),
        (pretrained_headless_vit, PRETRAINED_VIT, "classifier"),
        (pretrained_resnet, PRETRAINED_RESNET, "classifier.1"),
        (pretrained_dinov3, PRETRAINED_DINOV3, "classifier"),
        pytest.param(pretrained_timm, PRETRAINED_TIMM, "head", marks=with_timm),
        pytest.param(pretrained_headless_timm, PRETRAINED_TIMM, "head", marks=with_timm),
    ],
)
def test_all_but_the_last_layer_comes_from_the_pretrained_weights(
    make: Callable[[Path], Weights], settings: ModelParams, head: str, tmp_path: Path
) -> None:
    pretrained = make(tmp_path)

    classifier = build_classifier(settings, tmp_path, LABELS, SIZE)

    weights = without_counts(weights_of(classifier.network))
    assert weights.pop(f"{head}.weight").shape[0] == len(LABELS)
    assert weights.pop(f"{head}.bias").shape == (len(LABELS),)
    assert equal(weights, {name: pretrained[name] for name in weights})
    assert logits(classifier).shape == (2, len(LABELS))


@pytest.mark.parametrize(
    ("library", "maker", "name"),
    [
        ("torchvision", "models.get_model", "mnasnet0_5"),
        pytest.param("timm", "create_model", "mobilenetv3_small_050", marks=with_timm),
    ],
)
def test_a_new_last_layer_is_not_surer_than_one_of_torch(
    library: Any, maker: str, name: str, tmp_path: Path
) -> None:
    """Its random weights would otherwise be 20 times as large, and spoil the pretrained ones."""
    make = operator.attrgetter(maker)(importlib.import_module(library))
    (tmp_path / "config.json").write_text("{}")
    saved_weights(make(name, num_classes=1000), tmp_path)

    classifier = build_classifier(
        model_params("resnet34", library=library, name=name), tmp_path, LABELS, SIZE
    )

    (layer,) = output_layers(classifier.network, len(LABELS))
    assert isinstance(layer, nn.Linear)
    assert 0 < float(layer.weight.abs().max()) <= layer.in_features**-0.5


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (pretrained_vit, PRETRAINED_VIT),
        pytest.param(pretrained_timm, PRETRAINED_TIMM, marks=with_timm),
    ],
)
def test_a_last_layer_for_as_many_labels_is_kept(
    make: Callable[[Path], Weights], settings: ModelParams, tmp_path: Path
) -> None:
    pretrained = make(tmp_path)

    network = build_classifier(settings, tmp_path, [1, 2, 3, 4, 5, 6, 7], SIZE).network

    assert equal(weights_of(network), pretrained)


def test_a_config_that_changes_no_parameter_is_taken(tmp_path: Path) -> None:
    pretrained_vit(tmp_path)
    config = {"model_type": "vit", "hidden_dropout_prob": 0.25}

    network = build_classifier(model_params("vit", config=config), tmp_path, LABELS, SIZE).network

    assert 0.25 in {one.p for one in network.modules() if isinstance(one, nn.Dropout)}


def test_a_head_of_our_own_is_kept_for_the_same_labels_only(tmp_path: Path) -> None:
    trained = random_classifier(DINOV3, LABELS, seed=1)
    save_classifier(trained, DINOV3, tmp_path, "squeeze")
    record_source(tmp_path, "somewhere")

    same = build_classifier(PRETRAINED_DINOV3, tmp_path, LABELS, SIZE)
    others = build_classifier(PRETRAINED_DINOV3, tmp_path, [*LABELS, 9], SIZE)

    assert equal(weights_of(same.network), weights_of(trained.network))
    assert weights_of(others.network)["classifier.bias"].shape == (len(LABELS) + 1,)


@pytest.mark.parametrize(
    ("make", "config", "size", "reason"),
    [
        (
            pretrained_vit,
            {"model_type": "vit", "intermediate_size": 48},
            SIZE,
            r"weights have no vit\.\S+ with the shape \[48\]",
        ),
        (
            pretrained_vit,
            {"model_type": "vit", "hidden_size": 32},
            64,
            r"weights have no vit\.\S+ with the shape \[.*32\]",
        ),
        (pretrained_vit, {"model_type": "deit"}, SIZE, "weights have the model_type vit"),
        (pretrained_vit, {"model_type": "vit", "image_size": 32}, 64, r"64.*32"),
        (
            pretrained_vit,
            {"model_type": "vit", "hidden_sise": 16},
            SIZE,
            "has no key hidden_sise that can be set",
        ),
        (pretrained_mobilenet, {"reduced_tail": True}, SIZE, r"weights have no \S+ with the shape"),
    ],
)
def test_what_the_weights_cannot_do_is_one_line(
    make: Callable[[Path], Weights], config: dict[str, Any], size: int, reason: str, tmp_path: Path
) -> None:
    make(tmp_path)
    settings = PRETRAINED_VIT if make is pretrained_vit else PRETRAINED_MOBILENET
    settings = settings.model_copy(update={"config": config})
    text = f"^{settings.library} cannot build {settings.name} with this model's name and config"

    with pytest.raises(UserError, match=rf"{text} for images of {size} pixels: .*{reason}"):
        build_classifier(settings, tmp_path, LABELS, size)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (pretrained_mobilenet, PRETRAINED_MOBILENET),
        (pretrained_headless_vit, PRETRAINED_VIT),
        (pretrained_dinov3, PRETRAINED_DINOV3),
        pytest.param(pretrained_timm, PRETRAINED_TIMM, marks=with_timm),
        pytest.param(
            pretrained_dla,
            model_params("resnet34", library="timm", name="dla46x_c"),
            marks=with_timm,
        ),
    ],
)
def test_a_layer_that_the_weights_lack_does_not_start_at_random(
    make: Callable[[Path], Weights], settings: ModelParams, tmp_path: Path
) -> None:
    make(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(name for name in weights if "weight" in name)]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    record_source(tmp_path, "here")

    with pytest.raises(UserError, match=r"weights have no |Missing key"):
        build_classifier(settings, tmp_path, LABELS, SIZE)


@with_timm
@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("resnet3400", {}, "timm has no network resnet3400"),
        ("resnet18.nobody", {}, "Invalid pretrained tag"),
        # timm would ask the hub for the configuration of this one.
        ("someone/resnet18", {}, "timm has no network someone/resnet18"),
        ("resnet18", {"no_such_key": 1}, "no_such_key"),
        ("resnet18", {"num_classes": 3}, "its config has no key num_classes that can be set"),
        ("resnet18", {"checkpoint_path": "a.pth"}, "has no key checkpoint_path that can be set"),
        ("resnet18", {"pretrained_strict": False}, "no key pretrained_strict that can be set"),
        ("resnet18", {"in_chans": 1}, "expected input"),
        ("vit_tiny_patch16_224", {"img_size": 48}, "Input height .32. doesn't match model .48."),
    ],
)
def test_what_timm_cannot_build_is_one_line(
    name: str, config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    settings = TIMM.model_copy(update={"name": name, "config": config})

    with pytest.raises(UserError, match=f"timm cannot build {name} .*{reason}") as error:
        build_classifier(settings, tmp_path, LABELS, SIZE)

    assert "\n" not in str(error.value)


def test_a_missing_timm_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "stages.networks.timm_models", raising=False)
    monkeypatch.delattr("stages.networks.timm_models", raising=False)
    monkeypatch.setitem(sys.modules, "timm", None)

    with pytest.raises(UserError, match="timm is not installed: `make setup` installs it"):
        random_classifier(TIMM)


@with_timm
def test_a_network_that_timm_would_change_with_its_last_layer_is_loaded(tmp_path: Path) -> None:
    """reset_classifier leaves out the second of its last layers, which a teacher has taught."""
    timm = importlib.import_module("timm")
    (tmp_path / "config.json").write_text("{}")
    saved_weights(timm.create_model("repvit_m0_9", num_classes=7), tmp_path)
    settings = model_params("resnet34", library="timm", name="repvit_m0_9")
    classifier = build_classifier(settings, tmp_path, LABELS, SIZE)
    before = logits(classifier)

    save_classifier(classifier, settings, tmp_path / "model", "squeeze")

    assert torch.equal(logits(load_classifier(tmp_path / "model")), before)


@with_timm
def test_the_name_in_a_timm_models_config_cannot_lead_to_the_hub(tmp_path: Path) -> None:
    save_classifier(random_classifier(TIMM), TIMM, tmp_path, "squeeze")
    change_json(tmp_path / "config.json", name="hf-hub:someone/resnet18")

    with pytest.raises(UserError, match="timm has no network hf-hub:someone/resnet18"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("model", "name", "config", "reason"),
    [
        ("resnet34", "resnet3400", {}, "no classifier resnet3400"),
        # Building this network would download weights.
        ("resnet34", "fcn_resnet50", {}, "no classifier fcn_resnet50"),
        ("resnet34", "resnet18", {"no_such_key": 1}, "no_such_key"),
        ("resnet34", "resnet18", {"num_classes": 3}, "num_classes"),
        ("resnet34", "resnet18", {"weights": "DEFAULT"}, "weights"),
        ("vit", "x", {"model_type": "no-such-type"}, "no-such-type"),
        ("vit", "x", {"model_type": "bert"}, "BertConfig"),
        # This network hides random parts of each image.
        ("vit", "x", TINY_VIT | {"model_type": "vit_mae"}, "ViTMAEConfig"),
        (
            "vit",
            "x",
            TINY_VIT | {"hiden_size": 16},
            "its config has no key hiden_size that can be set",
        ),
        (
            "vit",
            "x",
            TINY_VIT | {"id2label": {"0": "1"}},
            "its config has no key id2label that can be set",
        ),
        ("vit", "x", {"model_type": "clip", "vision_config": {"depth": 1}}, "vision_config.depth"),
        ("vit", "x", TINY_VIT | {"hidden_size": "sixteen"}, "hidden_size"),
        ("vit", "x", TINY_VIT | {"image_size": 2 * SIZE}, "64"),
        # This network ignores the number of labels.
        (
            "vit",
            "x",
            {"model_type": "pvt", "depths": [1, 1, 1, 1]},
            r"its output has the shape \[1, 1000\], not a score for each of \[1, 2, 3, 4, 5\]",
        ),
    ],
)
def test_what_the_library_cannot_build_is_one_line(
    model: str, name: str, config: dict[str, Any], reason: str
) -> None:
    settings = model_params(model, name=name, config=config, pretrained=False)

    with pytest.raises(
        UserError, match=f"{settings.library} cannot build {name} .*{reason}"
    ) as error:
        random_classifier(settings)

    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            {"pretrained": False},
            "has no weights, since pretrained was false: `dvc repro` downloads them",
        ),
        ({}, r"config\.json is damaged \(its SHA-256 is not the one in "),
        (
            {"sha256": {"config.json": "0"}},
            r"config\.json is damaged \(its SHA-256 is not the one in .*source\.json\): remove it",
        ),
    ],
    ids=str,
)
def test_weights_that_are_not_those_of_the_pretrained_stage_are_refused(
    source: dict[str, Any], text: str, tmp_path: Path
) -> None:
    pretrained_vit(tmp_path)
    (tmp_path / "source.json").write_text(json.dumps(source))

    with pytest.raises(UserError, match=text):
        build_classifier(PRETRAINED_VIT, tmp_path, LABELS, SIZE)


@pytest.mark.parametrize("name", [*NETWORKS, "pretrained"])
def test_a_random_start_follows_torchs_seed(name: str, tmp_path: Path) -> None:
    pretrained_vit(tmp_path)

    def start(seed: int) -> Weights:
        torch.manual_seed(seed)
        settings = NETWORKS.get(name, PRETRAINED_VIT)
        return weights_of(build_classifier(settings, tmp_path, LABELS, SIZE).network)

    first, again, other = start(3), start(3), start(4)

    assert equal(first, again)
    assert not equal(first, other)


def test_a_random_vit_is_built_for_the_size_of_the_photographs() -> None:
    config = {key: value for key, value in TINY_VIT.items() if key != "image_size"}
    network: Any = random_classifier(model_params("vit", config=config, pretrained=False)).network

    assert network.config.image_size == SIZE


@every_network
def test_what_was_saved_is_loaded_with_all_that_is_needed_to_use_it(
    name: str, tmp_path: Path
) -> None:
    settings = NETWORKS[name]
    classifier = random_classifier(settings, labels=[1, 3, 10])
    before = logits(classifier)
    save_classifier(classifier, settings, tmp_path, "squeeze")

    loaded = load_classifier(tmp_path)

    assert torch.equal(logits(loaded), before)
    assert loaded.labels == [1, 3, 10]
    assert (loaded.size, loaded.mean, loaded.std) == (SIZE, settings.mean, settings.std)


@every_network
def test_the_same_weights_give_the_same_bytes_in_any_memory_format(
    name: str, tmp_path: Path
) -> None:
    for folder in ("first", "second"):
        classifier = random_classifier(NETWORKS[name])
        if folder == "second":
            classifier.network.to(memory_format=torch.channels_last)
        save_classifier(classifier, NETWORKS[name], tmp_path / folder, "squeeze")

    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        for folder in ("first", "second")
    )
    assert first == second
    assert first.keys() == {"config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.mark.parametrize("settings", [VIT, CONVNEXT], ids=["vit", "convnext"])
def test_transformers_loads_a_saved_model_by_itself(settings: ModelParams, tmp_path: Path) -> None:
    classifier = random_classifier(settings.model_copy(update={"mean": [0.53, 0.45, 0.36]}))
    before = logits(classifier)
    save_classifier(classifier, settings, tmp_path, "squeeze")

    network = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()

    assert network.config.id2label == {0: "1", 1: "2", 2: "3", 3: "4", 4: "5"}
    assert network.config.label2id == {"1": 0, "2": 1, "3": 2, "4": 3, "5": 4}
    with torch.inference_mode():
        assert torch.equal(network(noise_images()).logits, before)


@pytest.mark.parametrize("fit", ["squeeze", "pad"])
@pytest.mark.parametrize(
    ("height", "width", "tolerance"),
    # Resizing rounds to whole values, and a step of 1 is 1 / 255 / 0.5 after normalization.
    [(SIZE, SIZE, 1e-5), (75, 50, 0.008), (50, 75, 0.008), (20, 12, 0.008)],
)
def test_transformers_prepares_photographs_as_the_model_was_trained(
    fit: str, height: int, width: int, tolerance: float, tmp_path: Path
) -> None:
    classifier = random_classifier(VIT.model_copy(update={"mean": [0.53, 0.45, 0.36]}))
    save_classifier(classifier, VIT, tmp_path, fit)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)

    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    prepared = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]

    resized = torch.from_numpy(jpeg.resize(pixels, SIZE, fit)).permute(2, 0, 1)
    expected = normalizer(classifier)(resized[None] / 255)
    torch.testing.assert_close(prepared, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("fit", ["squeeze", "pad"])
def test_a_pipeline_of_transformers_counts_real_photographs_as_the_model_does(
    fit: str, abid: Path, tmp_path: Path
) -> None:
    classifier = random_classifier(VIT)
    save_classifier(classifier, VIT, tmp_path, fit)
    photographs = sorted((abid / "originals-1k/bin-images").glob("*.jpg"))[:40]

    counted = transformers.pipeline("image-classification", str(tmp_path))
    found = {
        name: [
            scores_by_pipeline(counted, photograph) - scores(classifier, photograph, name)
            for photograph in photographs
        ]
        for name in ("squeeze", "pad")
    }

    errors = {name: float(np.abs(differences).mean()) for name, differences in found.items()}
    (other,) = errors.keys() - {fit}
    assert errors[fit] < errors[other] / 20


def scores_by_pipeline(counted: Any, photograph: Path) -> NDArray[np.float64]:
    by_label = {row["label"]: row["score"] for row in counted(str(photograph), top_k=5)}
    return np.array([by_label[str(label)] for label in LABELS])


def scores(classifier: Classifier, photograph: Path, fit: str) -> NDArray[np.float64]:
    pixels = jpeg.resize(jpeg.decode(photograph.read_bytes()), SIZE, fit)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        logits = classifier.logits(normalizer(classifier)(image))
    return logits.softmax(1)[0].double().numpy()


def test_torchvision_loads_a_saved_model_by_itself(tmp_path: Path) -> None:
    settings = model_params(
        "resnet34", name="squeezenet1_1", config={"dropout": 0.125}, pretrained=False
    )
    classifier = random_classifier(settings)
    before = logits(classifier)
    save_classifier(classifier, settings, tmp_path, "squeeze")

    config = json.loads((tmp_path / "config.json").read_text())
    network = torchvision.models.get_model(config["name"], num_classes=5, **config["config"])
    network.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)

    with torch.inference_mode():
        assert torch.equal(network.eval()(noise_images()), before)
    assert config["id2label"] == {"0": "1", "1": "2", "2": "3", "3": "4", "4": "5"}
    (dropout,) = (one for one in network.modules() if isinstance(one, nn.Dropout))
    assert dropout.p == 0.125


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.popitem()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


# The last kind of damage changes nothing that ConvNeXt reads.
@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"convnext"}))
@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{"),
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: (folder / "preprocessor_config.json").write_text("{}"),
        lambda folder: (folder / "model.safetensors").write_bytes(b"cut"),
        lambda folder: change_json(folder / "config.json", id2label={"0": "one"}),
        lambda folder: change_json(folder / "config.json", name="resnet18", hidden_size=32),
        lose_a_weight,
    ],
    ids=["no text", "no object", "no size", "cut", "no quantities", "another network", "one less"],
)
def test_a_damaged_model_is_one_line_that_says_what_to_do(
    name: str, damage: Callable[[Path], object], tmp_path: Path
) -> None:
    save_classifier(random_classifier(NETWORKS[name]), NETWORKS[name], tmp_path, "squeeze")
    damage(tmp_path)

    with pytest.raises(UserError, match=rf"{tmp_path}\S* is damaged \(.*\): remove it.*`dvc pull`"):
        load_classifier(tmp_path)


MACHINES = [
    OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    OSError(errno.EIO, os.strerror(errno.EIO)),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    MemoryError(),
]


@every_network
@pytest.mark.parametrize("error", MACHINES, ids=repr)
def test_an_error_of_this_machine_is_not_the_models_fault(
    name: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_classifier(random_classifier(NETWORKS[name]), NETWORKS[name], tmp_path, "squeeze")

    def fail(*_: object) -> None:
        raise error

    library = library_of(NETWORKS[name].library)
    for function in ("build", "load"):
        monkeypatch.setattr(library, function, fail)
    number = getattr(error, "errno", errno.ENOMEM)

    uses: list[Callable[[], object]] = [
        lambda: random_classifier(NETWORKS[name]),
        lambda: load_classifier(tmp_path),
    ]
    for use in uses:
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            use()
        assert caught.value.errno == number


@pytest.mark.parametrize("name", ["mobilenet", "vit"])
def test_too_many_open_files_are_not_a_damaged_model(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_classifier(random_classifier(NETWORKS[name]), NETWORKS[name], folder, "squeeze")
    load_classifier(folder)
    opened, limits = [], resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        with suppress(OSError):
            while True:
                opened.append(open(os.devnull))  # noqa: PTH123, SIM115
        # config.json needs one more descriptor, and the weights another at the same time.
        opened.pop().close()
        with pytest.raises(OSError, match="Too many open files"):
            load_classifier(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for file in opened:
            file.close()


def test_code_that_a_models_config_names_is_not_run(tmp_path: Path) -> None:
    folder, trace = tmp_path / "model", tmp_path / "trace"
    save_classifier(random_classifier(VIT), VIT, folder, "squeeze")
    code = f"import pathlib; pathlib.Path({str(trace)!r}).touch()\nclass Trap: pass\n"
    (folder / "trap.py").write_text(code)
    names = {"AutoConfig": "trap.Trap", "AutoModelForImageClassification": "trap.Trap"}
    change_json(folder / "config.json", auto_map=names)

    load_classifier(folder)

    assert not trace.exists()


@pytest.mark.slow
def test_a_library_is_imported_only_by_its_own_module() -> None:
    code = """
import sys
import stages.networks.release
assert not {"torchvision", "transformers", "timm"} & set(sys.modules)
import stages.networks.transformers_models
assert not {"torchvision", "timm"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
