"""Changes of images, against torchvision's."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
)
from torchvision.transforms.v2.functional import normalize as torchvision_normalize

from stages.training.augmentation import flip, jitter_colors, normalize

FACTORS = torch.tensor(
    [[1.0, 1.0, 1.0], [0.5, 1.0, 1.0], [1.0, 1.5, 1.0], [1.0, 1.0, 0.2], [1.8, 0.3, 1.9], [0, 2, 0]]
)


def some_images(count: int = len(FACTORS)) -> Tensor:
    return torch.rand(count, 3, 9, 7, generator=torch.Generator().manual_seed(0))


def test_flip_mirrors_only_the_chosen() -> None:
    images = torch.arange(2 * 3 * 2 * 3, dtype=torch.float32).view(2, 3, 2, 3)

    flipped = flip(images, torch.tensor([False, True]))

    assert torch.equal(flipped[0], images[0])
    assert torch.equal(flipped[1], torch.from_numpy(images[1].numpy()[:, :, ::-1].copy()))


def test_normalize_is_torchvisions() -> None:
    images, mean, std = some_images(), [0.53, 0.45, 0.36], [0.17, 0.15, 0.11]

    normalized = normalize(images, torch.tensor(mean), torch.tensor(std))

    expected = torchvision_normalize(images, mean, std)
    torch.testing.assert_close(normalized, expected, rtol=0, atol=1e-6)


def test_each_image_gets_torchvisions_jitter_by_its_own_factors() -> None:
    images = some_images()

    jittered = jitter_colors(images, FACTORS)

    for image, factors, changed in zip(images, FACTORS.tolist(), jittered, strict=True):
        brightness, contrast, saturation = factors
        expected = adjust_brightness(image, brightness)
        expected = adjust_contrast(expected, contrast)
        expected = adjust_saturation(expected, saturation)
        torch.testing.assert_close(changed, expected, rtol=0, atol=1e-6)


def test_factors_of_1_change_nothing() -> None:
    images = some_images()

    assert torch.equal(jitter_colors(images, torch.ones(len(images), 3)), images)


@pytest.mark.parametrize("which", range(3), ids=["brightness", "contrast", "saturation"])
def test_each_factor_changes_images_by_itself(which: int) -> None:
    images = some_images()
    factors = torch.ones(len(images), 3)
    factors[:, which] = 0.5

    changed = jitter_colors(images, factors)

    assert ((changed - images).abs().amax((1, 2, 3)) > 0.01).all()
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_factors_of_another_precision_leave_the_images_as_they_are_typed() -> None:
    factors = torch.from_numpy(np.full((2, 3), 0.9))

    assert jitter_colors(some_images(2), factors).dtype == torch.float32


def test_an_empty_share_of_a_batch_stays_empty() -> None:
    images = some_images(0)

    assert jitter_colors(images, torch.ones(0, 3)).shape == images.shape
    assert flip(images, torch.ones(0, dtype=torch.bool)).shape == images.shape
