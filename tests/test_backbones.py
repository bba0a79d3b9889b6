"""Networks of all kinds: built, trained, frozen, saved and loaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stages.imaging.loader import Bins
from stages.networks.classifier import freeze_backbone, last_layer, load_classifier, save_classifier
from stages.runtime.errors import UserError
from stages.training.engine import Trainer
from tests.made import (
    TINY_CONVNEXT,
    TINY_RESNET,
    TINY_VIT,
    close,
    equal,
    logits,
    make_bins,
    model_knobs,
    noise,
    one_torch_thread,
    random_classifier,
    weights_of,
)

SMALL_TRANSFORMER = {
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TORCHVISION_NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "squeezenet1_0": {},
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "shufflenet_v2_x0_5": {},
    "mnasnet0_5": {},
    "efficientnet_b0": {},
    "regnet_y_400mf": {},
    "densenet121": {},
    # With more than one output in training.
    "googlenet": {"init_weights": False},
}
TRANSFORMERS_NETWORKS: dict[str, dict[str, Any]] = {
    "vit": TINY_VIT,
    "convnext": TINY_CONVNEXT,
    "resnet": TINY_RESNET,
    # With whole numbers among its weights.
    "swin": {
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
    "dinov2": {
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "beit": SMALL_TRANSFORMER | {"use_relative_position_bias": True, "out_indices": [0]},
    # With more than one class of networks.
    "deit": SMALL_TRANSFORMER,
    "segformer": {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
    },
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8},
}
BACKBONES = {
    name: model_knobs("resnet34", name=name, config=config, pretrained=False)
    for name, config in TORCHVISION_NETWORKS.items()
} | {
    f"{name} of transformers": model_knobs(
        "vit", config={"model_type": name} | config, pretrained=False, warmup_steps=0
    )
    for name, config in TRANSFORMERS_NETWORKS.items()
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Bins:
    return make_bins(tmp_path_factory.mktemp("bins"), [1, 2, 3, 4], noise)


@pytest.mark.parametrize("name", BACKBONES)
def test_any_backbone_is_trained_saved_and_loaded(name: str, bins: Bins, tmp_path: Path) -> None:
    # Two steps, since the average starts as the first one's weights.
    knobs = BACKBONES[name].model_copy(
        update={"epochs": 1, "batch_size": 2, "learning_rate": 1e-4, "ema_decay": 0.9}
    )
    classifier = random_classifier(knobs)
    start = weights_of(classifier.network)

    trainer = Trainer(classifier, bins, bins, bins, knobs, 4)
    (epoch,) = trainer.train()
    save_classifier(trainer.trained, knobs, tmp_path)

    trained = weights_of(classifier.network)
    parameters = dict(classifier.network.named_parameters())
    changed = [key for key in parameters if not torch.equal(trained[key], start[key])]
    assert len(changed) > 0.7 * len(parameters)
    loaded = load_classifier(tmp_path)
    assert equal(weights_of(loaded.network), weights_of(trainer.trained.network))
    scores, loaded_scores = ({"": logits(one)} for one in (trainer.trained, loaded))
    assert close(scores, loaded_scores, 1e-5)
    assert 0 < epoch.test_loss < 100
    counts = [key for key, value in start.items() if not value.is_floating_point()]
    kept = weights_of(trainer.trained.network)
    assert all(torch.equal(kept[key], trained[key]) for key in counts)


LAST_LAYERS = {
    "resnet18": "fc",
    "mobilenet_v3_small": "classifier.3",
    "squeezenet1_0": "classifier.1",
    "googlenet": "fc",
    "vit of transformers": "classifier",
    "convnext of transformers": "classifier",
    "resnet of transformers": "classifier.1",
}


@pytest.mark.parametrize("name", LAST_LAYERS)
def test_only_the_layer_that_gives_the_scores_is_left_to_be_trained(name: str) -> None:
    classifier = random_classifier(BACKBONES[name])

    freeze_backbone(classifier)

    layer = LAST_LAYERS[name]
    assert last_layer(classifier.network, len(classifier.labels)) == layer
    trained = [key for key, one in classifier.network.named_parameters() if one.requires_grad]
    assert trained == [f"{layer}.weight", f"{layer}.bias"]


@pytest.mark.parametrize("name", LAST_LAYERS)
def test_a_frozen_backbone_learns_in_its_last_layer(name: str, bins: Bins) -> None:
    knobs = BACKBONES[name].model_copy(
        update={"epochs": 1, "batch_size": 4, "learning_rate": 0.01, "freeze_backbone": True}
    )
    classifier = random_classifier(knobs)
    start = weights_of(classifier.network)

    list(Trainer(classifier, bins, bins, bins, knobs, 4).train())

    trained = weights_of(classifier.network)
    changed = [key for key in trained if not torch.equal(trained[key], start[key])]
    assert changed == [f"{LAST_LAYERS[name]}.weight", f"{LAST_LAYERS[name]}.bias"]


def test_a_network_without_such_a_layer_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no last layer with an output for each label"):
        last_layer(nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 6)), 5)
