"""What lies where in photographs: the histograms, and colors and finer edges cell by cell."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from stages.features.histograms import CELLS, SIDE, edge_histograms, photograph_features

#: The finer edges are those of a copy of this width and height.
FINE_SIDE = 128
# So few images stay in a processor's cache, which makes it three times as fast as a whole batch.
_AT_ONCE = 16


def layout_features(images: Tensor) -> Tensor:
    """The features of uint8 images [batch, 3, size, size], as float32 [batch, features]."""
    return torch.cat([_features(some) for some in torch.split(images, _AT_ONCE)])


def _features(images: Tensor) -> Tensor:
    small, fine = (
        interpolate(images, (side, side), mode="bilinear", antialias=True).float() / 255
        for side in (SIDE, FINE_SIDE)
    )
    edges = edge_histograms(fine.mean(1)).flatten(1).sqrt()
    return torch.cat([photograph_features(images), cell_colors(small).flatten(1), edges], 1)


def cell_colors(images: Tensor) -> Tensor:
    """The mean color of each cell and its standard deviation: [batch, 6, CELLS, CELLS].

    `images` [batch, 3, side, side] have values from 0 to 1.
    """
    width = images.shape[-1] // CELLS
    means, squares = avg_pool2d(images, width), avg_pool2d(images**2, width)
    # Rounding can make the variance of an even cell negative.
    return torch.cat([means, (squares - means**2).clamp(min=0).sqrt()], 1)
