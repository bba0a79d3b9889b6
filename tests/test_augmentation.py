"""Augmentation of images, compared with torchvision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    affine,
    gaussian_blur,
)

from stages.training.augmentation import (
    Change,
    blur,
    flip,
    jitter_colors,
    put_side_by_side,
    warp,
)

FACTORS = torch.tensor(
    [[1.0, 1.0, 1.0], [0.5, 1.0, 1.0], [1.0, 1.5, 1.0], [1.0, 1.0, 0.2], [1.8, 0.3, 1.9], [0, 2, 0]]
)
SIDE = 32


def some_images(count: int, width: int = SIDE) -> Tensor:
    return torch.rand(count, 3, SIDE, width, generator=torch.Generator().manual_seed(0))


def test_flip_mirrors_only_the_chosen_images() -> None:
    images = some_images(2)

    flipped = flip(images, torch.tensor([False, True]))

    assert torch.equal(flipped, torch.stack([images[0], images[1].flip(2)]))


def test_each_image_gets_torchvisions_jitter_by_its_own_factors() -> None:
    images = some_images(len(FACTORS))

    # The factors of an epoch's plan are float64.
    jittered = jitter_colors(images, FACTORS.double())

    assert jittered.dtype == torch.float32
    for image, factors, changed in zip(images, FACTORS.tolist(), jittered, strict=True):
        brightness, contrast, saturation = factors
        expected = adjust_brightness(image, brightness)
        expected = adjust_contrast(expected, contrast)
        expected = adjust_saturation(expected, saturation)
        torch.testing.assert_close(changed, expected, rtol=0, atol=1e-6)


def test_each_image_is_rotated_and_shifted_as_by_torchvision() -> None:
    moves = torch.tensor([[10.0, 0, 0], [0, 0.25, 0], [0, 0, -0.125], [-45, 0.5, 0.1]]).double()
    images = some_images(len(moves))

    warped = warp(images, moves)

    assert warped.dtype == torch.float32
    for image, (angle, right, down), changed in zip(images, moves.tolist(), warped, strict=True):
        shift = [right * SIDE, down * SIDE]
        expected = affine(image, angle, shift, 1, [0, 0], InterpolationMode.BILINEAR)
        torch.testing.assert_close(changed, expected, rtol=0, atol=1e-4)


def test_what_comes_in_from_outside_is_black() -> None:
    (shifted,) = warp(torch.ones(1, 3, SIDE, SIDE), torch.tensor([[0, 0.25, 0]]))

    assert shifted[:, :, : SIDE // 4].max() == 0
    torch.testing.assert_close(shifted[:, :, SIDE // 4 :], torch.ones(3, SIDE, 3 * SIDE // 4))


def square_at(row: int, column: int) -> Tensor:
    """A bright item of 4 pixels on black."""
    image = torch.zeros(1, 3, SIDE, SIDE)
    image[:, :, row : row + 4, column : column + 4] = 1
    return image


@settings(deadline=None)
@given(
    st.tuples(st.integers(4, SIDE - 8), st.integers(4, SIDE - 8)),
    st.tuples(st.floats(-5, 5), st.floats(-0.05, 0.05), st.floats(-0.05, 0.05)),
    st.floats(0, 1),
)
def test_an_item_survives_small_moves_and_blurs(
    place: tuple[int, int], moves: tuple[float, float, float], sigma: float
) -> None:
    image = square_at(*place)

    changed = warp(blur(image, torch.tensor([sigma])), torch.tensor([moves]))

    # A share of its light leaves with the tails of the blur; none is added.
    assert 0.9 < changed.sum() / image.sum() < 1.1


def test_each_image_is_blurred_as_by_torchvision() -> None:
    sigmas = torch.tensor([0.3, 1.0, 2.0]).double()
    images = some_images(len(sigmas))

    blurred = blur(images, sigmas)

    assert blurred.dtype == torch.float32
    for image, sigma, changed in zip(images, sigmas.tolist(), blurred, strict=True):
        # torchvision reflects the image at its border.
        inside = slice(10, -10)
        expected = gaussian_blur(image, [19, 19], [sigma, sigma])
        torch.testing.assert_close(
            changed[:, inside, inside], expected[:, inside, inside], rtol=0, atol=1e-4
        )


def test_a_blur_keeps_the_brightness_also_at_the_border() -> None:
    images = torch.full((2, 3, SIDE, SIDE), 0.6)

    torch.testing.assert_close(blur(images, torch.tensor([0.5, 5.0])), images)


def test_images_of_two_bins_have_both_halves() -> None:
    # The third and the fourth one are the partners of the first and the third of the batch.
    images = some_images(5)

    joined = put_side_by_side(images, torch.tensor([1, 0, -1]))

    def squeezed(image: Tensor) -> Tensor:
        return (image[:, :, ::2] + image[:, :, 1::2]) / 2

    assert joined.shape == (3, 3, SIDE, SIDE)
    torch.testing.assert_close(joined[0], torch.cat([squeezed(images[0]), squeezed(images[3])], 2))
    assert torch.equal(joined[1], images[1])
    torch.testing.assert_close(joined[2], torch.cat([squeezed(images[4]), squeezed(images[2])], 2))


def test_two_images_of_an_odd_width_share_the_pixel_in_the_middle() -> None:
    black_and_white = torch.cat([torch.zeros(1, 3, 9, 9), torch.ones(1, 3, 9, 9)])

    (joined,) = put_side_by_side(black_and_white, torch.tensor([1]))

    assert joined[0, 0].tolist() == [0.0] * 4 + [0.5] + [1.0] * 4


UNCHANGED: list[tuple[Change, Tensor]] = [
    (put_side_by_side, torch.zeros(4)),
    (jitter_colors, torch.ones(4, 3)),
    (blur, torch.zeros(4)),
    (warp, torch.zeros(4, 3)),
    (flip, torch.zeros(4, dtype=torch.bool)),
]


@pytest.mark.parametrize(("change", "values"), UNCHANGED)
def test_values_that_change_nothing(change: Change, values: Tensor) -> None:
    images = some_images(4)

    torch.testing.assert_close(change(images, values), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("change", "values"), UNCHANGED)
def test_an_empty_share_of_a_batch_stays_empty(change: Change, values: Tensor) -> None:
    images = some_images(0)

    assert change(images, values[:0]).shape == images.shape
