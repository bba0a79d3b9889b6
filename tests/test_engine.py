"""Training, on bins of synthetic squares that a tiny network learns."""

import io
import math
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, AdamW

from stages.imaging.loader import CPU, Bins
from stages.networks.inference import evaluate, normalizer
from stages.runtime.counts import AndMore
from stages.runtime.errors import UserError
from stages.runtime.params import ModelParams
from stages.training import engine
from stages.training.augmentation import blur, flip, jitter_colors, put_side_by_side, warp
from stages.training.checkpoint import Watch
from stages.training.engine import Epoch, Trainer
from stages.training.epochs import (
    EpochPlan,
    draw_partners,
    part_count,
    plan_epoch,
    split_into_batches,
    split_into_parts,
    sum_classes,
)
from stages.training.messages import report_start
from stages.training.processes import Processes
from tests.builders import (
    Large,
    close,
    equal,
    full_network,
    full_precision,
    make_bins,
    model_params,
    noise,
    one_torch_thread,
    pillow_pixels,
    tiny_classifier,
    tiny_network,
    weights_of,
)

LABELS = [1, 2, 3]
KNOBS = model_params("resnet34", epochs=3, batch_size=8, learning_rate=0.01)
#: All changes of the images.
AUGMENTED: dict[str, Any] = {
    "color_jitter": 0.4,
    "rotation": 10.0,
    "shift": 0.1,
    "blur": 1.0,
    "side_by_side": 0.5,
}
#: The bins to train on and to validate on.
Sets = tuple[Bins, Bins]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    """30 and 7 coloured squares."""
    return (
        make_bins(tmp_path_factory.mktemp("train"), LABELS * 10),
        make_bins(tmp_path_factory.mktemp("validation"), [1, 2, 3, 3, 2, 1, 1]),
    )


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    """20 and 7 squares of noise."""
    return (
        make_bins(tmp_path_factory.mktemp("train"), [1, 2, 3, 3] * 5, noise),
        make_bins(tmp_path_factory.mktemp("validation"), [1, 2, 3, 3, 2, 1, 1], noise),
    )


@pytest.fixture(name="full_precision")
def use_full_precision() -> Iterator[None]:
    with full_precision():
        yield


def settings_with(**changes: Any) -> ModelParams:
    return KNOBS.model_copy(update=changes)


def new_trainer(
    sets: Sets, settings: ModelParams, make_network: Callable[[int], nn.Module] = tiny_network
) -> Trainer:
    """A trainer that always starts from the same weights."""
    return Trainer(tiny_classifier(LABELS, make_network), *sets, settings, 16)


def trained(
    sets: Sets, settings: ModelParams, make_network: Callable[[int], nn.Module] = tiny_network
) -> tuple[dict[str, Tensor], list[Epoch]]:
    """The weights and the epochs of a training."""
    trainer = new_trainer(sets, settings, make_network)
    epochs = list(trainer.train())
    return weights_of(trainer.trained.network), epochs


@pytest.mark.parametrize(("optimizer", "ordinal_share"), [("adam", 1.0), ("adamw", 0.0)])
def test_a_task_that_can_be_learned_is_learned(
    optimizer: str, ordinal_share: float, sets: Sets
) -> None:
    settings = settings_with(epochs=6, optimizer=optimizer, ordinal_share=ordinal_share)
    _, epochs = trained(sets, settings)

    assert [epoch.epoch for epoch in epochs] == [1, 2, 3, 4, 5, 6]
    first, last = epochs[0], epochs[-1]
    assert last.train_loss < 0.5 * first.train_loss
    assert last.validation_loss < first.validation_loss
    assert last.train_accuracy > first.train_accuracy
    assert last.train_accuracy > 0.9
    assert last.validation_accuracy > 0.9


def test_a_seed_gives_the_same_weights_and_rows_bit_by_bit(sets: Sets) -> None:
    weights, epochs = trained(sets, KNOBS, full_network)
    trainer = new_trainer(sets, KNOBS, full_network)
    # The result does not depend on torch's own seed either.
    torch.manual_seed(99)

    assert list(trainer.train()) == epochs
    assert equal(weights_of(trainer.trained.network), weights)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"horizontal_flip": False},
        {"color_jitter": 0.1},
        {"rotation": 5.0},
        {"shift": 0.05},
        {"blur": 1.0},
        {"side_by_side": 0.5},
        {"weight_decay": 0.5},
        {"schedule": "linear"},
        {"schedule": "cosine"},
        {"warmup_steps": 3},
        {"ordinal_share": 0.1},
        {"label_smoothing": 0.1},
        # The length of the gradient matters to Adam only because of the small number that it adds.
        {"clip_norm": 0.1},
        {"ema_decay": 0.5},
        {"freeze_backbone": True},
    ],
    ids=str,
)
def test_a_changed_knob_gives_other_weights(change: dict[str, Any], sets: Sets) -> None:
    weights, epochs = trained(sets, KNOBS)
    others, other_epochs = trained(sets, settings_with(**change))

    assert not equal(weights, others)
    assert epochs != other_epochs


def test_dropout_is_another_in_each_epoch_step_and_process() -> None:
    drawn = set()
    for seed in (0, 1):
        for epoch in (1, 2):
            for step in (0, 1, 2):
                for rank in (0, 1):
                    engine.seed_dropout(seed, epoch, step, rank, CPU)
                    drawn.add(torch.rand(1).item())

    assert len(drawn) == 24


def test_bins_to_validate_on_are_not_learned_from(sets: Sets) -> None:
    train_bins, _ = sets

    weights, epochs = trained(sets, KNOBS, full_network)
    same, others = trained((train_bins, train_bins), KNOBS, full_network)

    assert equal(weights, same)
    for epoch, other in zip(epochs, others, strict=True):
        assert epoch.train_loss == other.train_loss
        assert epoch.validation_loss != other.validation_loss


def opposed(sets: Sets) -> Sets:
    """The same sets with wrong quantities in validation, so that learning makes it worse."""
    train_bins, validation_bins = sets
    return train_bins, replace(validation_bins, quantities=validation_bins.quantities % 3 + 1)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("ema_decay", [None, 0.5])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_weights_of_the_best_or_of_the_last_epoch_are_kept(
    keep: str, ema_decay: float | None, sets: Sets
) -> None:
    settings = settings_with(keep=keep, ema_decay=ema_decay, learning_rate=1e-4)
    trainer = new_trainer(opposed(sets), settings, full_network)

    epochs, weights = [], []
    for epoch in trainer.train():
        epochs.append(epoch)
        weights.append(weights_of(trainer.trained.network))

    accuracies = [epoch.validation_accuracy for epoch in epochs]
    assert accuracies[-1] < max(accuracies)
    kept = accuracies.index(max(accuracies)) + 1 if keep == "best" else 3
    assert trainer.kept_epoch == kept
    assert equal(weights_of(trainer.trained.network), weights[kept - 1])
    assert not equal(weights[0], weights[-1])


def test_choosing_an_epoch_to_keep_changes_no_step(sets: Sets) -> None:
    _, epochs = trained(opposed(sets), settings_with(keep="last"), full_network)
    _, same = trained(opposed(sets), settings_with(keep="best"), full_network)

    assert epochs == same


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [([0.4], 1), ([0.0, 0.0], 1), ([0.2, 0.5, 0.4], 2), ([0.2, 0.5, 0.5], 2), ([0.1, 0.2], 2)],
)
def test_the_best_epoch_is_the_earliest_with_the_highest_validation_accuracy(
    accuracies: list[float], best: int
) -> None:
    # The other columns would choose other epochs.
    rows = [[-number, number, number, accuracy] for number, accuracy in enumerate(accuracies)]

    assert engine.best_epoch(torch.tensor(rows, dtype=torch.float64)) == best


def test_the_copied_weights_of_any_network_can_be_loaded_again() -> None:
    # MNASNet refuses weights without the versions of its layers.
    network, other = (torchvision.models.get_model("mnasnet0_5", num_classes=3) for _ in range(2))

    copied = engine.copy_of_weights(network)
    buffer = io.BytesIO()
    torch.save(copied, buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))

    assert equal(weights_of(other), weights_of(network))
    with torch.no_grad():
        next(network.parameters()).zero_()
    assert equal(weights_of(other), copied)


class Recorder(nn.Module):
    """A layer on the mean colour that keeps the images it is trained on."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, labels)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.seen.append(images.detach().clone())
        logits: Tensor = self.head(images.mean((2, 3)))
        return logits


def recorded(sets: Sets, settings: ModelParams) -> list[Tensor]:
    """The batches that the network gets during a training."""
    trainer = new_trainer(sets, settings, Recorder)
    list(trainer.train())
    network = trainer.classifier.network
    assert isinstance(network, Recorder)
    return network.seen


def pixels_of(bins: Bins) -> Tensor:
    """All photographs of the bins, decoded by Pillow, with values from 0 to 1."""
    pixels = np.stack([pillow_pixels(bins.images[row]) for row in range(len(bins))])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


def normalized(images: Tensor) -> Tensor:
    return normalizer(tiny_classifier(LABELS))(images)


def targets_of(bins: Bins) -> Tensor:
    return torch.tensor([LABELS.index(quantity) for quantity in bins.quantities])


def identified(images: Tensor, bins: Bins) -> list[tuple[int, bool]]:
    """The bin that each image shows, and whether it is mirrored. Each image must show a bin."""
    originals = normalized(pixels_of(bins))
    found = []
    for image in images:
        for mirrored, candidates in ((False, originals), (True, originals.flip(3))):
            same = (candidates == image).all((1, 2, 3)).nonzero().flatten().tolist()
            found += [(row, mirrored) for row in same]
    assert len(found) == len(images)
    return found


def test_each_epoch_trains_on_each_bin_once_in_its_own_order(sets: Sets) -> None:
    batches = recorded(sets, settings_with(epochs=2))

    train_bins = sets[0]
    assert [len(batch) for batch in batches] == 2 * [8, 8, 8, 6]
    first = identified(torch.cat(batches[:4]), train_bins)
    second = identified(torch.cat(batches[4:]), train_bins)
    orders = [[row for row, _ in found] for found in (first, second)]
    everything = list(range(len(train_bins)))
    assert sorted(orders[0]) == sorted(orders[1]) == everything
    assert orders[0] != orders[1]
    assert everything not in orders
    assert [mirrored for _, mirrored in sorted(first)] != [
        mirrored for _, mirrored in sorted(second)
    ]


@pytest.mark.parametrize(("horizontal_flip", "fewest", "most"), [(True, 15, 45), (False, 0, 0)])
def test_about_half_of_the_images_are_mirrored_or_none(
    horizontal_flip: bool, fewest: int, most: int, sets: Sets
) -> None:
    batches = recorded(sets, settings_with(epochs=2, horizontal_flip=horizontal_flip))

    mirrored = [mirrored for _, mirrored in identified(torch.cat(batches), sets[0])]
    assert len(mirrored) == 60
    assert fewest <= sum(mirrored) <= most


def plan_of(sets: Sets, settings: ModelParams, processes: Processes | None = None) -> EpochPlan:
    """The plan of the second epoch."""
    return plan_epoch(sets[0], tiny_classifier(LABELS), settings, processes or Processes(), 2)


def test_each_image_is_changed_as_the_epochs_plan_says(sets: Sets) -> None:
    settings = settings_with(epochs=2, **AUGMENTED)

    images = torch.cat(recorded(sets, settings)[4:])

    plan = plan_of(sets, settings)
    expected = pixels_of(sets[0])[torch.from_numpy(plan.rows(slice(None)))]
    for change in (put_side_by_side, jitter_colors, blur, warp, flip):
        expected = change(expected, plan.changes[change])
    torch.testing.assert_close(images, normalized(expected), rtol=0, atol=1e-4)


def test_without_changes_each_image_is_loaded_as_it_is(sets: Sets) -> None:
    plan = plan_of(sets, settings_with(horizontal_flip=False))

    assert plan.changes == {}
    assert plan.rows(slice(3, 9)).tolist() == plan.order[3:9].tolist()


def test_changes_do_not_alter_what_the_others_and_the_order_draw(sets: Sets) -> None:
    plan = plan_of(sets, settings_with(**AUGMENTED))

    # The order, the flips and the colors share the generator of the epoch.
    random = np.random.default_rng([KNOBS.seed, 2])
    order = random.permutation(30)
    assert plan.order.tolist() == order.tolist()
    assert plan.changes[flip].tolist() == (random.random(30) < 0.5)[order].tolist()
    factors = 1 + AUGMENTED["color_jitter"] * random.uniform(-1, 1, (30, 3))
    assert plan.changes[jitter_colors].tolist() == factors[order].tolist()
    for names in (["rotation", "shift"], ["blur"], ["side_by_side"]):
        some = plan_of(sets, settings_with(**{name: AUGMENTED[name] for name in names}))
        assert len(some.changes) == 2
        for change, values in some.changes.items():
            assert torch.equal(values, plan.changes[change])


def test_moves_and_blurs_reach_their_limits_and_not_further(sets: Sets) -> None:
    changes = plan_of(sets, settings_with(**AUGMENTED)).changes

    angles, *shifts = changes[warp].unbind(1)
    assert 0.8 * AUGMENTED["rotation"] < angles.abs().max() <= AUGMENTED["rotation"]
    for shift in shifts:
        assert 0.8 * AUGMENTED["shift"] < shift.abs().max() <= AUGMENTED["shift"]
    assert 0.8 * AUGMENTED["blur"] < changes[blur].max() <= AUGMENTED["blur"]
    assert changes[blur].min() >= 0
    for values in (angles, *shifts):
        assert values.min() < 0 < values.max()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_two_bins_side_by_side_are_labelled_with_the_sum(share: float, sets: Sets) -> None:
    plan = plan_of(sets, settings_with(side_by_side=share))

    quantities = sets[0].quantities
    own = quantities[plan.order]
    others = np.where(plan.partners < 0, 0, quantities[plan.partners])
    assert [LABELS[number] for number in plan.targets] == (own + others).tolist()
    sides = plan.changes[put_side_by_side].numpy()
    assert (sides != 0).tolist() == (plan.partners >= 0).tolist()
    assert set(sides[sides != 0]) == {-1, 1}
    # No class is three items and one more. Of the others, the share is drawn.
    assert (plan.partners < 0)[own == 3].all()
    assert (plan.partners >= 0)[own < 3].mean() == pytest.approx(share, abs=0.25)


@pytest.mark.parametrize(
    ("labels", "sums"),
    [
        ([1, 2, 3], [[1, 2, -1], [2, -1, -1], [-1, -1, -1]]),
        ([0, 1], [[0, 1], [1, -1]]),
        # An open class takes all higher sums.
        ([0, 1, AndMore(2)], [[0, 1, 2], [1, 2, 2], [2, 2, 2]]),
        ([2, 4, AndMore(7)], [[1, -1, 2], [-1, 2, 2], [2, 2, 2]]),
        ([3, 4, 5], [[-1] * 3] * 3),
    ],
)
def test_the_classes_of_sums(labels: list[int], sums: list[list[int]]) -> None:
    assert sum_classes(labels).tolist() == sums


@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=6, unique=True).map(sorted),
    st.booleans(),
    st.lists(st.integers(0, 5), min_size=1, max_size=20),
)
def test_a_bin_has_a_partner_wherever_there_is_one_with_a_class_for_the_sum(
    labels: list[int], is_open: bool, numbers: list[int]
) -> None:
    if is_open:
        labels = [*labels[:-1], AndMore(labels[-1])]
    classes = np.array(numbers) % len(labels)

    partners = draw_partners(classes, sum_classes(labels), settings_with(side_by_side=1.0), 1)

    def has_class(row: int, other: int) -> bool:
        total = labels[classes[row]] + labels[classes[other]]
        return total in labels or (is_open and total >= labels[-1])

    for row, partner in enumerate(partners):
        if partner >= 0:
            assert has_class(row, partner)
        else:
            assert not any(has_class(row, other) for other in range(len(classes)))


def test_each_possible_partner_is_as_likely_as_the_others() -> None:
    classes = np.array([0] * 3000 + [1] * 2 + [2])

    partners = draw_partners(classes, sum_classes(LABELS), settings_with(side_by_side=1.0), 1)

    # Bins with one item take each other or one with two.
    assert partners[:3000].max() < 3002
    assert len(set(partners[:3000])) > 1800
    assert 0 < (partners[:3000] >= 3000).sum() < 12


@pytest.mark.parametrize(
    ("images", "batch_size", "sizes"),
    [
        (30, 8, [8, 8, 8, 6]),
        (32, 8, [8, 8, 8, 8]),
        (34, 8, [8, 8, 8, 8, 2]),
        # A last batch of one image joins the batch before it.
        (33, 8, [8, 8, 8, 9]),
        (9, 8, [9]),
        (3, 2, [3]),
        (7, 8, [7]),
        (8, 8, [8]),
        (1, 8, [1]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_batches_are_full_but_for_what_is_left(
    images: int, batch_size: int, sizes: list[int]
) -> None:
    batches = split_into_batches(images, batch_size)

    assert [len(batch) for batch in batches] == sizes
    assert np.concatenate(batches).tolist() == list(range(images))


@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 8])
@pytest.mark.parametrize("images", [2, 3, 7, 8, 9])
def test_a_batch_is_shared_by_parts_and_processes(
    images: int, accumulation: int, size: int
) -> None:
    batch = np.arange(20, 20 + images)

    parts = [split_into_parts(batch, accumulation, Processes(rank, size)) for rank in range(size)]

    # All processes have the same number of parts, some of them empty, since they wait for each
    # other.
    count = part_count(images, accumulation)
    assert {len(slices) for slices in parts} == {count}
    places = np.arange(100)
    shares = [[places[part] for part in slices] for slices in parts]
    ordered = [shares[rank][part] for part in range(count) for rank in range(size)]
    assert np.concatenate(ordered).tolist() == batch.tolist()
    for part in range(count):
        lengths = [len(shares[rank][part]) for rank in range(size)]
        assert max(lengths) - min(lengths) <= 1
        # No part is a single image.
        assert sum(lengths) >= 2


def global_pool_network(labels: int) -> nn.Module:
    """Batch normalization of features of one pixel, as at the end of a ResNet for small images."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 32, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, labels)
    )


@pytest.mark.parametrize(
    ("batch_size", "accumulation"), [(8, 8), (8, 5), (3, 3), (3, 2), (2, 2), (29, 29)]
)
def test_batch_normalization_never_gets_a_single_image(
    batch_size: int, accumulation: int, sets: Sets
) -> None:
    settings = settings_with(batch_size=batch_size, accumulation=accumulation, epochs=1)

    _, epochs = trained(sets, settings, global_pool_network)

    assert math.isfinite(epochs[0].train_loss)


def test_a_batch_of_one_image_is_refused_where_there_is_batch_normalization(
    sets: Sets, tmp_path: Path
) -> None:
    settings = settings_with(batch_size=1, epochs=1)
    only_one = make_bins(tmp_path, [1])

    with pytest.raises(UserError, match="not one: set this model's batch_size to 2 or more"):
        new_trainer(sets, settings, full_network)
    with pytest.raises(UserError, match=r"not one: raise split\.train"):
        new_trainer((only_one, *sets[1:]), KNOBS, full_network)
    # A frozen backbone is not normalized by the batch, and other networks accept one image.
    trained(sets, settings.model_copy(update={"freeze_backbone": True}), full_network)
    trained(sets, settings, tiny_network)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_an_epoch_is_the_same_whatever_the_number_of_processes(
    size: int, accumulation: int, sets: Sets
) -> None:
    settings = settings_with(accumulation=accumulation, **AUGMENTED)

    alone = plan_of(sets, settings)
    plans = [plan_of(sets, settings, Processes(rank, size)) for rank in range(size)]

    for plan in plans:
        assert plan.order.tolist() == alone.order.tolist()
        assert plan.sizes == alone.sizes
        assert plan.partners.tolist() == alone.partners.tolist()
        assert torch.equal(plan.targets, alone.targets)
        assert plan.changes.keys() == alone.changes.keys()
        for change, values in plan.changes.items():
            assert torch.equal(values, alone.changes[change])


def gradients_of(sets: Sets, settings: ModelParams) -> list[dict[str, Tensor]]:
    """The gradients that the optimizer gets in each step."""
    trainer = new_trainer(sets, settings)
    parameters = dict(trainer.classifier.network.named_parameters())
    found: list[dict[str, Tensor]] = []

    def keep(*_: Any) -> None:
        found.append(
            {name: one.grad.clone() for name, one in parameters.items() if one.grad is not None}
        )

    trainer.state.optimizer.register_step_pre_hook(keep)
    list(trainer.train())
    return found


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("accumulation", [2, 3, 8])
def test_a_batch_in_parts_gives_the_gradient_of_the_whole(accumulation: int, noisy: Sets) -> None:
    # A batch of 8 images has at most 4 parts. The last batch of the 20 images has 4 images.
    settings = settings_with(epochs=1, clip_norm=1.0, label_smoothing=0.1, **AUGMENTED)

    whole = gradients_of(noisy, settings)
    in_parts = gradients_of(noisy, settings.model_copy(update={"accumulation": accumulation}))

    assert len(whole) == len(in_parts) == 3
    for some, others in zip(whole, in_parts, strict=True):
        assert len(some) == 4
        assert close(some, others, 1e-4 * max(value.abs().max().item() for value in some.values()))


def norm_of(gradients: dict[str, Tensor]) -> float:
    squares = [value.square().sum().item() for value in gradients.values()]
    return math.sqrt(sum(squares))


def test_a_gradient_longer_than_clip_norm_is_cut_to_it(noisy: Sets) -> None:
    free = gradients_of(noisy, KNOBS)
    limit = norm_of(free[0]) / 2

    cut = gradients_of(noisy, settings_with(clip_norm=limit))
    untouched = gradients_of(noisy, settings_with(clip_norm=1e6))

    assert norm_of(cut[0]) == pytest.approx(limit, rel=1e-4)
    assert all(norm_of(gradients) < limit * 1.0001 for gradients in cut)
    # The direction stays the same.
    shortened = {name: value / 2 for name, value in free[0].items()}
    assert close(shortened, cut[0], limit / 1000)
    assert all(equal(one, other) for one, other in zip(free, untouched, strict=True))


class Numbered(nn.Module):
    """A network with an integer buffer, like the position numbers in networks of transformers."""

    numbers: Tensor

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.network = full_network(labels)
        self.register_buffer("numbers", torch.arange(1000))

    def forward(self, images: Tensor) -> Tensor:
        assert torch.equal(self.numbers, torch.arange(1000))
        logits: Tensor = self.network(images)
        return logits


def test_the_moving_average_is_that_of_a_plain_loop(sets: Sets) -> None:
    trainer = new_trainer(sets, settings_with(ema_decay=0.9), Numbered)
    network = trainer.classifier.network
    steps: list[dict[str, Tensor]] = []
    trainer.state.optimizer.register_step_post_hook(lambda *_: steps.append(weights_of(network)))
    epochs = list(trainer.train())

    average = steps[0]
    for weights in steps[1:]:
        for name, weight in weights.items():
            if weight.is_floating_point():
                average[name] = 0.9 * average[name] + 0.1 * weight
            else:
                average[name] = weight

    kept = weights_of(trainer.trained.network)
    assert len(steps) == 12
    assert kept.keys() == average.keys()
    assert "network.1.running_var" in kept
    assert close(average, kept, 1e-5)
    assert not close(weights_of(network), kept, 1e-3)
    # The average is what is validated.
    scores, last = evaluate(trainer.trained, sets[1], 16), epochs[-1]
    assert (last.validation_loss, last.validation_accuracy) == (scores.loss, scores.accuracy)


def test_a_frozen_backbone_stays_as_it_is_with_its_statistics(sets: Sets) -> None:
    before = weights_of(tiny_classifier(LABELS, full_network).network)

    after, epochs = trained(sets, settings_with(freeze_backbone=True), full_network)

    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"5.weight", "5.bias"}
    assert epochs[-1].train_loss < epochs[0].train_loss


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU through g++")
@pytest.mark.usefixtures("full_precision")
def test_a_compiled_network_learns_the_same(noisy: Sets) -> None:
    # The last batch is smaller, so it uses the network that is not compiled.
    weights, epochs = trained(noisy, settings_with(epochs=1, compile=False))
    others, other_epochs = trained(noisy, settings_with(epochs=1, compile=True))

    assert close(weights, others, KNOBS.learning_rate / 100)
    assert epochs[0].train_loss == pytest.approx(other_epochs[0].train_loss, rel=1e-4)
    assert epochs[0].validation_loss == pytest.approx(other_epochs[0].validation_loss, rel=1e-4)


def test_only_full_batches_go_to_the_compiled_network(
    sets: Sets, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def compiled(module: nn.Module, *, dynamic: bool) -> Callable[[Tensor], Any]:
        assert not dynamic

        def forward(images: Tensor) -> Any:
            sizes.append(len(images))
            return module(images)

        # The function that tests the compiler is left alone.
        return forward if isinstance(module, nn.Module) else module

    monkeypatch.setattr("torch.compile", compiled)
    list(new_trainer(sets, settings_with(epochs=1, compile=True)).train())
    assert sizes == [8, 8, 8]

    # auto does not compile on a CPU.
    list(new_trainer(sets, settings_with(epochs=1, compile="auto")).train())
    list(new_trainer(sets, settings_with(epochs=1, compile=False)).train())
    assert sizes == [8, 8, 8]


def test_the_first_line_says_with_how_many_threads_a_cpu_computes(
    sets: Sets, capsys: pytest.CaptureFixture[str]
) -> None:
    report_start("vit", new_trainer(sets, settings_with(epochs=1)), resumed=False)

    assert f" on 1 x cpu (threads: {torch.get_num_threads()}), 1 ep" in capsys.readouterr().out


def test_a_training_that_could_not_be_compiled_says_so_in_one_line(
    sets: Sets, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = new_trainer(sets, settings_with(epochs=1))
    report_start("vit", trainer, resumed=False)
    assert "torch.compile" not in capsys.readouterr().out
    trainer.compiling_problem = "No working C++ compiler found"

    report_start("vit", trainer, resumed=False)

    (line,) = (one for one in capsys.readouterr().out.splitlines() if "torch.compile" in one)
    assert line.startswith("vit: warning: training is slower without torch.compile")
    assert "(No working C++ compiler found): it needs a C++ compiler" in line


def test_the_schedule_is_laid_out_over_all_steps_of_all_epochs(
    sets: Sets, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def rate(_: ModelParams, step: int, steps: int) -> float:
        asked.append((step, steps))
        return 0.001 * step

    used = []
    monkeypatch.setattr(engine, "learning_rate", rate)
    trainer = new_trainer(sets, KNOBS)
    groups = trainer.state.optimizer.param_groups
    trainer.state.optimizer.register_step_pre_hook(
        lambda *_: used.append([group["lr"] for group in groups])
    )
    list(trainer.train())

    # There are 3 epochs, and 30 bins in batches of 8.
    assert trainer.steps == 4
    assert asked == [(step, 3 * 4) for step in range(12)]
    assert used == [[0.001 * step] * 2 for step in range(12)]


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize(("name", "optimizer"), [("adam", Adam), ("adamw", AdamW)])
def test_steps_are_the_optimizers_own(name: str, optimizer: type[Adam], sets: Sets) -> None:
    weights, _ = trained(
        sets, settings_with(batch_size=30, weight_decay=0.5, horizontal_flip=False, optimizer=name)
    )

    network = tiny_classifier(LABELS).network
    parameters = list(network.parameters())
    decaying = {"params": [one for one in parameters if one.ndim > 1], "weight_decay": 0.5}
    others = {"params": [one for one in parameters if one.ndim == 1], "weight_decay": 0}
    plain = optimizer([decaying, others], lr=KNOBS.learning_rate)
    for _ in range(3):
        plain.zero_grad()
        loss = cross_entropy(network(normalized(pixels_of(sets[0]))), targets_of(sets[0]))
        loss.backward()  # type: ignore[no-untyped-call]
        plain.step()

    # Means are compared, because Adam takes a full step even if a gradient is only rounding.
    for key, expected in weights_of(network).items():
        assert (weights[key] - expected).abs().mean().item() < KNOBS.learning_rate / 100


@pytest.mark.parametrize(
    ("change", "make_network"),
    [
        ({}, tiny_network),
        ({"ordinal_share": 0.5}, tiny_network),
        ({"label_smoothing": 0.3}, tiny_network),
        # A frozen backbone has no dropout and is not normalized by the batch.
        ({"freeze_backbone": True}, full_network),
    ],
)
def test_an_epochs_row_has_the_means_over_its_bins_whatever_is_minimized(
    change: dict[str, Any], make_network: Callable[[int], nn.Module], sets: Sets
) -> None:
    # With a negligible learning rate and no flips, training computes what evaluation does.
    settings = settings_with(epochs=1, learning_rate=1e-30, horizontal_flip=False, **change)

    _, (row,) = trained(sets, settings, make_network)

    classifier = tiny_classifier(LABELS, make_network)
    scores = evaluate(classifier, sets[0], 100)
    assert row.train_loss == pytest.approx(scores.loss, abs=1e-3)
    assert row.train_accuracy == pytest.approx(scores.accuracy)
    scores = evaluate(classifier, sets[1], 16)
    assert (row.validation_loss, row.validation_accuracy) == (scores.loss, scores.accuracy)


class Exploding(nn.Module):
    """A network whose loss is not finite in one of the forward passes of its training."""

    def __init__(self, labels: int, bad_pass: int, factor: float = float("nan")) -> None:
        super().__init__()
        self.network = tiny_network(labels)
        self.bad_pass = bad_pass
        self.factor = factor
        self.passes = 0

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        if not self.training:
            return logits
        self.passes += 1
        return logits * self.factor if self.passes == self.bad_pass else logits


@pytest.mark.parametrize("steps_to_look", [1, 1000])
@pytest.mark.parametrize(
    ("bad_pass", "accumulation", "place", "rate"),
    [
        (1, 1, "step 1 of epoch 1", "0.01"),
        (6, 1, "step 2 of epoch 2", "0.00583333"),
        (6, 2, "step 3 of epoch 1", "0.00833333"),
    ],
)
def test_a_loss_that_is_not_finite_names_its_step_and_learning_rate(
    bad_pass: int, accumulation: int, place: str, rate: str, steps_to_look: int, sets: Sets
) -> None:
    settings = settings_with(schedule="linear", accumulation=accumulation)
    trainer = new_trainer(sets, settings, lambda labels: Exploding(labels, bad_pass))

    # The step is named even if the watch looks much later.
    with pytest.raises(UserError) as error:
        list(trainer.train(Watch(_steps_to_look=steps_to_look)))

    assert str(error.value) == (
        f"the loss is not finite at {place}, at a learning rate of {rate}: lower this model's"
        " learning_rate (0.01), or set its clip_norm to 1.0. The last good checkpoint is kept"
    )


def loader_threads() -> set[str]:
    return {one.name for one in threading.enumerate() if one.name.startswith("ThreadPoolExecutor")}


def test_a_training_that_fails_leaves_no_thread_behind(sets: Sets) -> None:
    before = loader_threads()

    # While the error is in use, nothing that it refers to is collected.
    with pytest.raises(UserError) as error:
        trained(sets, KNOBS, lambda labels: Exploding(labels, bad_pass=1))

    assert loader_threads() == before, error


class BadlyValidated(nn.Module):
    """A network that does well until it is validated."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.network = tiny_network(labels)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits if self.training else logits * float("inf")


def test_a_validation_loss_that_is_not_finite_names_the_epoch(sets: Sets) -> None:
    text = (
        r"the validation loss is (nan|inf) after epoch 1: lower this model's learning_rate"
        r" \(0\.01\)"
    )
    with pytest.raises(UserError, match=text):
        trained(sets, KNOBS, BadlyValidated)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("batch_size", "accumulation", "most", "failed", "advised", "fitting"),
    [
        (8, 1, 7, 8, 2, 4),
        (8, 1, 3, 8, 4, 2),
        (8, 2, 2, 4, 4, 2),
        # There are fewer parts than images, because no part has a single image.
        (6, 1, 2, 6, 4, 2),
        # 30 images in batches of 29 make one batch of 30, which has at most 14 parts.
        (29, 3, 4, 10, 12, 3),
    ],
)
def test_a_batch_that_does_not_fit_names_an_accumulation_that_does(
    batch_size: int,
    accumulation: int,
    most: int,
    failed: int,
    advised: int,
    fitting: int,
    backward: bool,
    sets: Sets,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_with(batch_size=batch_size, accumulation=accumulation, epochs=1)

    def large(labels: int) -> nn.Module:
        return Large(labels, most, backward=backward)

    with pytest.raises(UserError) as error:
        trained(sets, settings, large)

    assert str(error.value) == (
        f"{failed} images of 32 pixels do not fit into cpu: set this model's accumulation to"
        f" {advised}, and {fitting} at once fit; batch_size stays {batch_size}"
    )
    # params.yaml accepts this value, and training with it works.
    changed = ModelParams.model_validate(settings.model_dump() | {"accumulation": advised})
    trainer = new_trainer(sets, changed, large)
    monkeypatch.setattr(trainer, "validate", lambda *_: (0.0, 0.0))
    assert len(list(trainer.train())) == 1


def test_smaller_parts_are_said_to_change_batch_normalization(sets: Sets) -> None:
    def large(labels: int) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(3), Large(labels, 3, backward=False))

    with pytest.raises(UserError) as error:
        trained(sets, settings_with(epochs=1), large)

    assert str(error.value) == (
        "8 images of 32 pixels do not fit into cpu: set this model's accumulation to 4, and 2 at"
        " once fit; batch_size stays 8, but batch normalization then takes its statistics from"
        " parts of 2 images, which changes the result"
    )


@pytest.mark.parametrize(("batch_size", "failed"), [(8, 8), (2, 2)])
def test_images_of_which_not_even_two_fit_are_said_to_be_too_large(
    batch_size: int, failed: int, sets: Sets
) -> None:
    with pytest.raises(UserError) as error:
        trained(
            sets,
            settings_with(batch_size=batch_size),
            lambda labels: Large(labels, 0, backward=False),
        )

    assert str(error.value) == (
        f"{failed} images of 32 pixels do not fit into cpu, whatever this model's accumulation:"
        " lower its image_size, or free the GPU's memory"
    )
