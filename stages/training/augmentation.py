"""Random changes to a batch of images, on its device, that keep the number of items.

Each takes images [batch, 3, size, size] with values from 0 to 1, and a value or more for each of
them, so that every image is changed in its own way. None of them cuts pieces out of images,
as crops and CutMix do: that could remove or halve items.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

Change = Callable[[Tensor, Tensor], Tensor]


def put_side_by_side(images: Tensor, sides: Tensor) -> Tensor:
    """Put some images beside another one, and squeeze the two to the width of one.

    `sides` [batch] is -1 where the other image comes to the left, 1 where it comes to the right,
    and 0 where there is none. `images` are those of the batch, followed by the others in the same
    order. Returns a batch.
    """
    batch = torch.arange(len(sides), device=sides.device)
    # Where there is no other image, this is any one.
    others = len(sides) - 1 + (sides != 0).cumsum(0)
    left = images[torch.where(sides < 0, others, batch)]
    right = images[torch.where(sides < 0, batch, others)]
    joined = avg_pool2d(torch.cat((left, right), 3), (1, 2))
    return torch.where((sides != 0).view(-1, 1, 1, 1), joined, images[: len(sides)])


def jitter_colors(images: Tensor, factors: Tensor) -> Tensor:
    """Change the brightness, contrast and saturation.

    `factors` [batch, 3] multiply them; 1 changes nothing. The arithmetic is that of torchvision's
    ColorJitter.
    """
    brightness, contrast, saturation = factors.to(images.dtype).view(-1, 3, 1, 1, 1).unbind(1)
    images = (images * brightness).clamp(0, 1)
    images = _blend(images, _gray(images).mean((2, 3), keepdim=True), contrast)
    return _blend(images, _gray(images), saturation)


def _blend(images: Tensor, others: Tensor, ratio: Tensor) -> Tensor:
    return (ratio * images + (1 - ratio) * others).clamp(0, 1)


def _gray(images: Tensor) -> Tensor:
    """The luma of ITU-R BT.601, [batch, 1, height, width]."""
    return 0.2989 * images[:, 0:1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:3]


def blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Blur with a Gaussian whose standard deviation in pixels is `sigmas` [batch].

    At the border, the weights of the pixels inside the image are scaled so that they sum to 1.
    """
    places = torch.arange(images.shape[-1], dtype=images.dtype, device=images.device)
    distances = (places - places[:, None]).square()
    # So narrow that it changes nothing, and does not divide by 0.
    variances = sigmas.to(images.dtype).clamp(min=0.01).square().view(-1, 1, 1, 1)
    # A Gaussian whose weights sum to 1 is a softmax.
    weights = (distances / (-2 * variances)).softmax(3)
    return weights @ images @ weights.mT


def warp(images: Tensor, moves: Tensor) -> Tensor:
    """Rotate around the center, then shift. What comes in from outside is black.

    `moves` [batch, 3] has degrees clockwise, and shifts to the right and down as shares of the
    size. What leaves the image is lost, so only small moves keep the count: a shift of 0.05 hides
    a strip of 11 pixels out of 224, in which few items fit as a whole.
    """
    if not len(images):
        return images  # affine_grid refuses an empty batch.
    angles = moves[:, 0].deg2rad()
    rows = angles.cos(), angles.sin(), -angles.sin(), angles.cos()
    rotation = torch.stack(rows, 1).view(-1, 2, 2)
    # From places in the result to places in the image, in units of half the size.
    shift = -2 * rotation @ moves[:, 1:, None]
    places = torch.cat((rotation, shift), 2).to(images.dtype)
    grid = affine_grid(places, list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror the images for which `flipped` [batch] is true."""
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)
