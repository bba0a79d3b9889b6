"""Changes to a batch of images, on its device. None of them crops: that could remove items."""

import torch
from torch import Tensor


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror the images [batch, 3, height, width] for which `flipped` [batch] is true."""
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)


def jitter_colors(images: Tensor, factors: Tensor) -> Tensor:
    """Change the brightness, contrast and saturation of images with values from 0 to 1.

    `factors` [batch, 3] multiply them; 1 changes nothing. The arithmetic is that of torchvision's
    ColorJitter, but each image of the batch has its own factors.
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
