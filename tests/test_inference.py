"""Using a classifier: evaluation compared with a plain loop, devices and classes."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stages.imaging.loader import CPU, Bins
from stages.networks import inference
from stages.networks.inference import evaluate, normalizer, place, predict
from stages.runtime.errors import Stopped
from tests.builders import (
    SIZE,
    equal,
    full_network,
    full_precision,
    make_bins,
    one_torch_thread,
    pillow_pixels,
    tiny_classifier,
    tiny_network,
    weights_of,
)

LABELS = [1, 2, 3]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Bins:
    return make_bins(tmp_path_factory.mktemp("test"), [1, 2, 3, 3, 2, 1, 1])


@pytest.fixture(name="full_precision")
def use_full_precision() -> Iterator[None]:
    with full_precision():
        yield


def normalized(bins: Bins) -> Tensor:
    """All photographs of the bins, decoded by Pillow and normalized."""
    pixels = np.stack([pillow_pixels(bins.images[row]) for row in range(len(bins))])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    return normalizer(tiny_classifier(LABELS))(images)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_evaluate_is_a_plain_loop_over_every_bin(batch_size: int, held_out: Bins) -> None:
    classifier = tiny_classifier(LABELS)
    with torch.inference_mode():
        logits = torch.cat([classifier.network(image[None]) for image in normalized(held_out)])
    targets = torch.tensor([LABELS.index(quantity) for quantity in held_out.quantities])

    scores = evaluate(classifier, held_out, batch_size)

    assert scores.probabilities.shape == (7, 3)
    np.testing.assert_allclose(scores.probabilities, logits.softmax(1).numpy(), atol=1e-5)
    assert scores.loss == pytest.approx(cross_entropy(logits, targets).item(), abs=1e-5)
    right = sum(
        int(row.argmax()) == int(target) for row, target in zip(logits, targets, strict=True)
    )
    assert scores.accuracy == pytest.approx(right / 7)


def test_evaluate_uses_the_network_as_it_is_after_training(held_out: Bins) -> None:
    classifier = tiny_classifier(LABELS, full_network)
    network, before = classifier.network, weights_of(classifier.network)

    def probabilities(batch_size: int) -> NDArray[np.float32]:
        network.train()
        return evaluate(classifier, held_out, batch_size).probabilities

    # There is no dropout, and batch statistics are neither used nor updated.
    np.testing.assert_array_equal(probabilities(4), probabilities(4))
    np.testing.assert_allclose(probabilities(4), probabilities(7), atol=1e-5)
    assert equal(weights_of(network), before)


def test_every_batch_is_announced_before_its_scores(held_out: Bins) -> None:
    events: list[str] = []
    classifier = tiny_classifier(LABELS)
    classifier.network.register_forward_hook(lambda *_: events.append("scored"))

    predict(classifier, held_out, 3, before_batch=lambda: events.append("announced"))

    assert events == ["announced", "scored"] * 3


def test_scoring_that_is_stopped_leaves_no_thread_behind(held_out: Bins) -> None:
    def stop() -> None:
        raise Stopped(15, "before the first batch")

    before = set(threading.enumerate())

    # While the error is in use, nothing that it refers to is collected.
    with pytest.raises(Stopped) as error:
        predict(tiny_classifier(LABELS), held_out, 3, before_batch=stop)

    assert set(threading.enumerate()) == before, error


@pytest.mark.parametrize("rows", [[], [2], [6, 0, 3, 4]], ids=str)
def test_some_rows_are_scored_in_their_order(rows: list[int], held_out: Bins) -> None:
    classifier = tiny_classifier(LABELS)
    whole = predict(classifier, held_out, 100)

    some = predict(classifier, held_out, 3, np.array(rows, np.int64), threads=2)

    assert some.dtype == torch.float32
    torch.testing.assert_close(some, whole[rows])


class InBfloat16(nn.Module):
    """A network whose scores are in bfloat16, as autocast makes them on a GPU."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.network = tiny_network(labels)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.network(images)
        return scores.bfloat16()


def test_scores_in_bfloat16_become_probabilities_in_float32(held_out: Bins) -> None:
    classifier = tiny_classifier(LABELS, InBfloat16)
    exact = predict(classifier, held_out, 3).double().softmax(1).numpy()

    probabilities = evaluate(classifier, held_out, 3).probabilities

    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, exact, rtol=1e-6)


def test_a_network_is_placed_in_channels_last() -> None:
    classifier = tiny_classifier(LABELS)

    place(classifier, CPU)

    assert classifier.device == CPU
    (weight, *_) = classifier.network.parameters()
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_normalized_images_have_mean_0_and_deviation_1() -> None:
    classifier = tiny_classifier(LABELS)
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (classifier.mean, classifier.std)
    )
    deviations = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)

    found = normalizer(classifier)(mean + std * deviations.expand(2, 3, SIZE, SIZE))

    torch.testing.assert_close(found, deviations.expand(2, 3, SIZE, SIZE))


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({}, torch.float32),
        ({"avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_bfloat16_is_for_processors_that_compute_in_it(
    capabilities: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)

    with inference.autocast(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
