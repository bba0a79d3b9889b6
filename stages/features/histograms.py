"""Histograms of the colors and edges of photographs."""

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

#: Photographs are reduced to this width and height, which leaves the outlines of the items.
SIDE = 64
#: The levels of red, of green and of blue; each combination is a color.
LEVELS = 4
#: Cells across and down, each with a histogram of the directions of its edges.
CELLS = 8
DIRECTIONS = 9


def photograph_features(images: Tensor) -> Tensor:
    """The histograms of uint8 images [batch, 3, size, size], as float32 [batch, features].

    These are square roots, so that a few large values do not outweigh all the others (Arandjelovic
    and Zisserman, Three things everyone should know to improve object retrieval, 2012).
    """
    small = interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
    grey = small.float().mean(1) / 255
    return torch.cat([color_histogram(small), edge_histograms(grey).flatten(1)], 1).sqrt()


def color_histogram(images: Tensor) -> Tensor:
    """The share of each color in uint8 images [batch, 3, side, side]: [batch, LEVELS ** 3]."""
    red, green, blue = (images.int() * LEVELS // 256).unbind(1)
    colors = (red * LEVELS + green) * LEVELS + blue
    histograms = [torch.bincount(one, minlength=LEVELS**3) for one in colors.flatten(1)]
    return torch.stack(histograms).float() / colors[0].numel()


def edge_histograms(grey: Tensor) -> Tensor:
    """The strength of the edges of images [batch, side, side]: [batch, DIRECTIONS, CELLS, CELLS].

    `side` is a multiple of CELLS. See Dalal and Triggs, Histograms of Oriented Gradients for Human
    Detection, 2005, sections 6.2 and 6.3: a gradient counts for the two directions next to its own,
    and its sign does not matter. Their blocks are not normalized here, since the strength of the
    edges tells how full a bin is.
    """
    down, across = torch.gradient(grey, dim=(1, 2))
    strength = torch.hypot(down, across)
    direction = torch.atan2(down, across) * (DIRECTIONS / math.pi)
    planes, half = [], DIRECTIONS / 2
    for number in range(DIRECTIONS):
        distance = (torch.remainder(direction - number + half, DIRECTIONS) - half).abs()
        planes.append(strength * (1 - distance).clamp(min=0))
    return avg_pool2d(torch.stack(planes, 1), grey.shape[-1] // CELLS)
