"""Augmentation of images, compared with torchvision."""

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
)

from stages.training.augmentation import flip, jitter_colors

FACTORS = torch.tensor(
    [[1.0, 1.0, 1.0], [0.5, 1.0, 1.0], [1.0, 1.5, 1.0], [1.0, 1.0, 0.2], [1.8, 0.3, 1.9], [0, 2, 0]]
)


def some_images(count: int = len(FACTORS)) -> Tensor:
    return torch.rand(count, 3, 9, 7, generator=torch.Generator().manual_seed(0))


def test_flip_mirrors_only_the_chosen_images() -> None:
    images = some_images(2)

    flipped = flip(images, torch.tensor([False, True]))

    assert torch.equal(flipped, torch.stack([images[0], images[1].flip(2)]))


def test_each_image_gets_torchvisions_jitter_by_its_own_factors() -> None:
    images = some_images()

    # The factors of an epoch's plan are float64.
    jittered = jitter_colors(images, FACTORS.double())

    assert jittered.dtype == torch.float32
    for image, factors, changed in zip(images, FACTORS.tolist(), jittered, strict=True):
        brightness, contrast, saturation = factors
        expected = adjust_brightness(image, brightness)
        expected = adjust_contrast(expected, contrast)
        expected = adjust_saturation(expected, saturation)
        torch.testing.assert_close(changed, expected, rtol=0, atol=1e-6)


def test_factors_of_1_change_nothing() -> None:
    images = some_images()

    assert torch.equal(jitter_colors(images, torch.ones(len(images), 3)), images)


def test_an_empty_share_of_a_batch_stays_empty() -> None:
    images = some_images(0)

    assert jitter_colors(images, torch.ones(0, 3)).shape == images.shape
    assert flip(images, torch.ones(0, dtype=torch.bool)).shape == images.shape
