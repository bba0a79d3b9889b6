"""Training and evaluating, on bins of coloured squares that a tiny network learns."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torchvision.transforms.v2.functional import normalize

from stages.core import engine
from stages.core.command import UserError
from stages.core.engine import Epoch
from stages.core.loader import Bins
from stages.core.networks import Classifier
from stages.core.params import Model
from tests.made import SIZE, make_bins, model_knobs, pillow_pixels, tiny_classifier

LABELS = [1, 2, 3]
KNOBS = model_knobs("resnet34", epochs=3, batch_size=8, learning_rate=0.01)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def train_bins(tmp_path_factory: pytest.TempPathFactory) -> Bins:
    return make_bins(tmp_path_factory.mktemp("train"), LABELS * 10)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Bins:
    return make_bins(tmp_path_factory.mktemp("test"), [1, 2, 3, 3, 2, 1, 1])


@pytest.fixture
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 also on a processor that computes in bfloat16, for comparisons to many digits."""
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)


def made_classifier() -> Classifier:
    torch.manual_seed(0)
    return tiny_classifier(LABELS)


def trained(train_bins: Bins, held_out: Bins, knobs: Model) -> tuple[list[Tensor], list[Epoch]]:
    """The weights and the epochs of a training that starts from always the same weights."""
    classifier = made_classifier()
    epochs = list(engine.train(classifier, train_bins, held_out, knobs))
    return [weight.detach() for weight in classifier.network.parameters()], epochs


def equal(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_task_that_can_be_learned_is_learned(
    optimizer: str, train_bins: Bins, held_out: Bins
) -> None:
    knobs = KNOBS.model_copy(update={"epochs": 6, "optimizer": optimizer})

    _, epochs = trained(train_bins, held_out, knobs)

    assert [epoch.epoch for epoch in epochs] == [1, 2, 3, 4, 5, 6]
    first, last = epochs[0], epochs[-1]
    assert last.train_loss < 0.5 * first.train_loss
    assert last.test_loss < first.test_loss
    assert last.train_accuracy > first.train_accuracy
    assert last.train_accuracy > 0.9
    assert last.test_accuracy > 0.9


def test_a_seed_gives_the_same_weights_and_rows_bit_by_bit(
    train_bins: Bins, held_out: Bins
) -> None:
    weights, epochs = trained(train_bins, held_out, KNOBS)
    again, epochs_again = trained(train_bins, held_out, KNOBS)

    assert equal(weights, again)
    assert epochs == epochs_again


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"horizontal_flip": False}, {"weight_decay": 0.5}, {"schedule": "linear"}],
    ids=str,
)
def test_a_changed_knob_gives_other_weights(
    change: dict[str, object], train_bins: Bins, held_out: Bins
) -> None:
    weights, epochs = trained(train_bins, held_out, KNOBS)
    others, other_epochs = trained(train_bins, held_out, KNOBS.model_copy(update=change))

    assert not equal(weights, others)
    assert epochs != other_epochs


def test_training_does_not_depend_on_torchs_global_seed(train_bins: Bins, held_out: Bins) -> None:
    weights, _ = trained(train_bins, held_out, KNOBS)
    classifier = made_classifier()
    torch.manual_seed(99)
    list(engine.train(classifier, train_bins, held_out, KNOBS))

    assert equal(weights, classifier.network.parameters())


def test_an_epoch_does_not_depend_on_how_many_follow(train_bins: Bins, held_out: Bins) -> None:
    _, epochs = trained(train_bins, held_out, KNOBS)
    _, fewer = trained(train_bins, held_out, KNOBS.model_copy(update={"epochs": 2}))

    assert epochs[:2] == fewer


class Recorder(nn.Module):
    """A layer on the mean colour that keeps the images it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, len(LABELS))
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.seen.append(images.detach().clone())
        logits: Tensor = self.head(images.mean((2, 3)))
        return logits


def recorded(train_bins: Bins, held_out: Bins, knobs: Model) -> list[Tensor]:
    """The batches of a training, as the network gets them."""
    recorder = Recorder()
    classifier = replace(made_classifier(), network=recorder)
    list(engine.train(classifier, train_bins, held_out, knobs))
    return recorder.seen


def normalized(bins: Bins) -> Tensor:
    """All photographs of the bins, through Pillow and the engine's normalize."""
    pixels = np.stack([pillow_pixels(image.as_py()) for image in bins.images])
    return engine.normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2), made_classifier())


def identified(images: Tensor, bins: Bins) -> list[tuple[int, bool]]:
    """Which bin each image is, and whether it is mirrored. Every image must be one of the bins."""
    originals = normalized(bins)
    found = []
    for image in images:
        for mirrored, candidates in ((False, originals), (True, originals.flip(3))):
            same = (candidates == image).all((1, 2, 3)).nonzero().flatten().tolist()
            found += [(row, mirrored) for row in same]
    assert len(found) == len(images)
    return found


def test_each_epoch_trains_on_each_bin_once_in_its_own_order(
    train_bins: Bins, held_out: Bins
) -> None:
    batches = recorded(train_bins, held_out, KNOBS.model_copy(update={"epochs": 2}))

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
    horizontal_flip: bool, fewest: int, most: int, train_bins: Bins, held_out: Bins
) -> None:
    knobs = KNOBS.model_copy(update={"epochs": 2, "horizontal_flip": horizontal_flip})

    batches = recorded(train_bins, held_out, knobs)

    mirrored = [mirrored for _, mirrored in identified(torch.cat(batches), train_bins)]
    assert len(mirrored) == 60
    assert fewest <= sum(mirrored) <= most


def test_flip_mirrors_only_the_chosen() -> None:
    images = torch.arange(2 * 3 * 2 * 3, dtype=torch.float32).view(2, 3, 2, 3)

    flipped = engine.flip(images, torch.tensor([False, True]))

    assert torch.equal(flipped[0], images[0])
    assert torch.equal(flipped[1], torch.from_numpy(images[1].numpy()[:, :, ::-1].copy()))


def test_normalize_is_torchvisions() -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8, generator=random)
    classifier = made_classifier()

    expected = normalize(images / 255, classifier.mean, classifier.std)

    torch.testing.assert_close(engine.normalize(images, classifier), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "factors"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1, 1]),
        ("constant", 2, [0, 1 / 2, 1, 1, 1, 1, 1]),
        ("linear", 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]),
        ("linear", 2, [0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4, 0]),
        ("linear", 8, [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8]),
    ],
)
def test_the_learning_rate_follows_its_table(
    schedule: str, warmup_steps: int, factors: list[float]
) -> None:
    knobs = KNOBS.model_copy(update={"schedule": schedule, "warmup_steps": warmup_steps})

    factor = engine.learning_rate_schedule(knobs, 6)

    assert [factor(step) for step in range(7)] == pytest.approx(factors)


@pytest.mark.parametrize(("warmup_steps", "steps"), [(0, 5), (3, 10), (10, 10), (20, 10)])
def test_the_linear_schedule_is_that_of_transformers(warmup_steps: int, steps: int) -> None:
    knobs = KNOBS.model_copy(update={"schedule": "linear", "warmup_steps": warmup_steps})

    def rates(make: str) -> list[float]:
        optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
        if make == "own":
            scheduler = LambdaLR(optimizer, engine.learning_rate_schedule(knobs, steps))
        else:
            scheduler = transformers.get_linear_schedule_with_warmup(optimizer, warmup_steps, steps)
        found = []
        for _ in range(steps + 2):
            found.append(float(scheduler.get_last_lr()[0]))
            optimizer.step()
            scheduler.step()
        return found

    assert rates("own") == pytest.approx(rates("transformers"), abs=1e-12)


def test_the_first_step_of_a_warm_up_changes_nothing(train_bins: Bins, held_out: Bins) -> None:
    knobs = KNOBS.model_copy(
        update={"epochs": 1, "batch_size": 100, "warmup_steps": 5, "weight_decay": 0.1}
    )
    start = list(made_classifier().network.parameters())

    warming, _ = trained(train_bins, held_out, knobs)
    at_once, _ = trained(train_bins, held_out, knobs.model_copy(update={"warmup_steps": 0}))

    assert equal(start, warming)
    assert not equal(start, at_once)


def test_the_schedule_is_laid_out_over_all_steps_of_all_epochs(
    train_bins: Bins, held_out: Bins, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []

    def schedule(_: Model, steps: int) -> Callable[[int], float]:
        lengths.append(steps)
        return float

    monkeypatch.setattr(engine, "learning_rate_schedule", schedule)
    trained(train_bins, held_out, KNOBS)

    assert lengths == [3 * 4]  # epochs, and batches of 8 in 30 bins


def test_a_loss_that_is_not_finite_names_the_learning_rate(
    train_bins: Bins, held_out: Bins
) -> None:
    knobs = KNOBS.model_copy(update={"learning_rate": 1e30})

    with pytest.raises(UserError, match=r"the loss of epoch 1 is .*: lower .* learning_rate"):
        trained(train_bins, held_out, knobs)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize(("name", "optimizer"), [("adam", Adam), ("adamw", AdamW)])
def test_steps_are_the_optimizers_own(
    name: str, optimizer: type[Adam], train_bins: Bins, held_out: Bins
) -> None:
    changes = {"epochs": 3, "batch_size": 30, "weight_decay": 0.5, "horizontal_flip": False}
    weights, _ = trained(
        train_bins, held_out, KNOBS.model_copy(update=changes | {"optimizer": name})
    )

    network = made_classifier().network
    plain = optimizer(network.parameters(), lr=KNOBS.learning_rate, weight_decay=0.5)
    targets = torch.tensor([LABELS.index(quantity) for quantity in train_bins.quantities])
    for _ in range(3):
        plain.zero_grad()
        loss = cross_entropy(network(normalized(train_bins)), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        plain.step()

    # Means: Adam goes its whole step also along a gradient that is nothing but rounding.
    for weight, expected in zip(weights, network.parameters(), strict=True):
        assert (weight - expected).abs().mean().item() < KNOBS.learning_rate / 100


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_evaluate_is_a_plain_loop_over_every_bin(batch_size: int, held_out: Bins) -> None:
    classifier = made_classifier()
    with torch.inference_mode():
        logits = torch.cat([classifier.network(image[None]) for image in normalized(held_out)])
    targets = torch.tensor([LABELS.index(quantity) for quantity in held_out.quantities])

    scores = engine.evaluate(classifier, held_out, batch_size)

    assert scores.probabilities.shape == (7, 3)
    np.testing.assert_allclose(scores.probabilities, logits.softmax(1).numpy(), atol=1e-5)
    assert scores.loss == pytest.approx(cross_entropy(logits, targets).item(), abs=1e-5)
    right = sum(
        int(row.argmax()) == int(target) for row, target in zip(logits, targets, strict=True)
    )
    assert scores.accuracy == pytest.approx(right / 7)


def test_evaluate_uses_the_network_as_it_is_after_training(held_out: Bins) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(3 * SIZE * SIZE, 3))
    classifier = replace(made_classifier(), network=network.train())

    scores = [engine.evaluate(classifier, held_out, 4).probabilities for _ in range(2)]

    np.testing.assert_array_equal(scores[0], scores[1])


def test_an_epochs_row_has_the_means_over_its_bins(train_bins: Bins, held_out: Bins) -> None:
    # Without a learning rate to speak of, training is evaluation, but for the flips.
    knobs = KNOBS.model_copy(update={"epochs": 1, "learning_rate": 1e-30, "horizontal_flip": False})

    _, (row,) = trained(train_bins, held_out, knobs)

    scores = engine.evaluate(made_classifier(), train_bins, 100)
    assert row.train_loss == pytest.approx(scores.loss, abs=1e-3)
    assert row.train_accuracy == pytest.approx(scores.accuracy)
    scores = engine.evaluate(made_classifier(), held_out, 16)
    assert (row.test_loss, row.test_accuracy) == (scores.loss, scores.accuracy)


def test_class_numbers_are_places_in_the_labels(tmp_path: Path) -> None:
    bins = make_bins(tmp_path, [5, 1, 3, 5])

    numbers = engine.class_numbers(bins, [1, 3, 5])

    assert numbers.dtype == torch.int64
    assert numbers.tolist() == [2, 0, 1, 2]


def test_quantities_that_the_model_does_not_know_are_refused(held_out: Bins) -> None:
    with pytest.raises(UserError, match=r"knows the quantities \[1\], not \[2, 3\]"):
        engine.class_numbers(held_out, [1])
