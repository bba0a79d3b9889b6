"""Pretrained networks on images of another size than those that they learned from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from stages.networks.classifier import Classifier, build_classifier, load_classifier, logits_of
from stages.networks.classifier import save_classifier as save
from stages.networks.positions import resize_positions
from stages.networks.pretrained import record_source
from stages.runtime.params import ModelParams
from tests.builders import SIZE, TINY_CONVNEXT, TINY_VIT, model_params, one_torch_thread

LABELS = [1, 2, 3, 4, 5]
TWICE = 2 * SIZE
#: The standard deviation of random weights, so large that the scores depend on the images.
SPREAD = 0.1
TINY_SWIN = {"patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
TINY: dict[str, dict[str, Any]] = {
    "vit": TINY_VIT,
    "deit": TINY_VIT,
    "dinov2": {key: value for key, value in TINY_VIT.items() if key != "intermediate_size"},
    "dinov3_vit": TINY_VIT,
    "convnextv2": TINY_CONVNEXT,
    "swin": TINY_SWIN | {"image_size": SIZE, "window_size": 4},
}
#: Those that look at where a patch is by position embeddings.
WITH_POSITIONS = ["vit", "deit", "dinov2"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


def pretrained(model_type: str, folder: Path) -> Any:
    """A random network for five labels and images of SIZE pixels, saved as pretrained weights.

    Its position embeddings are as smooth as learned ones, and so large that they matter.
    """
    torch.manual_seed(0)
    values = {key: value for key, value in TINY[model_type].items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(model_type, **values, num_labels=len(LABELS))
    config.initializer_range = SPREAD
    config.architectures = []
    auto = transformers.AutoModelForImageClassification
    if model_type == "dinov3_vit":
        auto = transformers.AutoModel
    network = auto.from_config(config).eval()
    for name, value in network.state_dict().items():
        if name.endswith("position_embeddings"):
            tokens = value.shape[1] - (SIZE // 8) ** 2
            coarse = torch.randn(1, value.shape[2], 2, 2)
            smooth = interpolate(coarse, SIZE // 8, mode="bicubic").flatten(2).transpose(1, 2)
            value[:, tokens:] = smooth
    network.save_pretrained(folder)
    record_source(folder, "here")
    return network


def settings_of(model_type: str, **config: Any) -> ModelParams:
    return model_params("vit", config={"model_type": model_type, **config})


def smooth_images(size: int) -> Tensor:
    """Eight images in a color each, a little lighter here and darker there, alike at each size."""
    chance = torch.Generator().manual_seed(1)
    colors = torch.randn(8, 3, 1, 1, generator=chance)
    shades = 0.3 * torch.randn(8, 3, 3, 3, generator=chance)
    return interpolate(colors + shades, size, mode="bicubic", align_corners=False)


def scores(network: Any, images: Tensor, **options: Any) -> Tensor:
    network.eval()
    with torch.inference_mode():
        return logits_of(network(images, **options))


@pytest.mark.parametrize("model_type", WITH_POSITIONS)
def test_the_scores_of_a_vit_stay_close_at_twice_the_size(model_type: str, tmp_path: Path) -> None:
    network = pretrained(model_type, tmp_path)
    before = scores(network, smooth_images(SIZE))

    larger = build_classifier(settings_of(model_type), tmp_path, LABELS, TWICE)

    assert change(before, scores(larger.network, smooth_images(TWICE))) < 0.15
    # They are far with embeddings that start at random.
    state = larger.network.state_dict()
    (positions,) = (value for name, value in state.items() if name.endswith("position_embeddings"))
    positions.normal_(std=SPREAD)
    assert change(before, scores(larger.network, smooth_images(TWICE))) > 0.4


def change(before: Tensor, after: Tensor) -> float:
    """The root mean squared change of the scores, in their standard deviation among images."""
    return float((after - before).square().mean().sqrt() / before.std(dim=0).mean())


@pytest.mark.parametrize("model_type", WITH_POSITIONS)
@pytest.mark.parametrize("size", [SIZE // 2, 48, TWICE])
def test_positions_are_interpolated_as_transformers_does(
    model_type: str, size: int, tmp_path: Path
) -> None:
    network = pretrained(model_type, tmp_path)
    own = {} if model_type == "dinov2" else {"interpolate_pos_encoding": True}
    expected = scores(network, smooth_images(size), **own)

    classifier = build_classifier(settings_of(model_type), tmp_path, LABELS, size)

    torch.testing.assert_close(scores(classifier.network, smooth_images(size)), expected)


@pytest.mark.parametrize("model_type", TINY)
@pytest.mark.parametrize("size", [48, TWICE])
def test_a_pretrained_network_learns_from_images_of_another_size(
    model_type: str, size: int, tmp_path: Path
) -> None:
    pretrained(model_type, tmp_path)
    settings = settings_of(model_type)
    classifier = build_classifier(settings, tmp_path, [1, 2, 3], size)

    train_a_step(classifier)
    save(classifier, settings, tmp_path / "model", "squeeze")
    loaded = load_classifier(tmp_path / "model")

    images = smooth_images(size)
    assert loaded.size == size
    torch.testing.assert_close(scores(loaded.network, images), scores(classifier.network, images))


def train_a_step(classifier: Classifier) -> None:
    optimizer = torch.optim.SGD(classifier.network.parameters(), 0.01)
    classifier.network.train()
    found = classifier.logits(smooth_images(classifier.size))
    targets = torch.arange(len(found)) % len(classifier.labels)
    cross_entropy(found, targets).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


@pytest.mark.parametrize(
    ("name", "config"), [("test_vit", {"img_size": SIZE}), ("test_resnet", {})]
)
def test_timms_weights_fit_images_of_another_size(
    name: str, config: dict[str, Any], tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm", reason="timm isn't installed")
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=5, **config).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    record_source(tmp_path, "here")
    settings = model_params("resnet34", library="timm", name=name)

    classifier = build_classifier(settings, tmp_path, LABELS, TWICE)
    save(classifier, settings, tmp_path / "model", "squeeze")
    loaded = load_classifier(tmp_path / "model")

    images = smooth_images(TWICE)
    assert loaded.size == TWICE
    assert torch.equal(scores(loaded.network, images), scores(classifier.network, images))
    assert change(scores(network, smooth_images(SIZE)), scores(loaded.network, images)) < 0.3


@pytest.mark.parametrize(("before", "after"), [(17, 20), (18, 65), (5, 3)])
def test_positions_that_are_no_square_are_refused(before: int, after: int) -> None:
    with pytest.raises(ValueError, match=f"{before} position embeddings cannot become {after}"):
        resize_positions(torch.zeros(1, before, 4), after)
