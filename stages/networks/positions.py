"""Position embeddings for images of another size than those that a network learned from."""

import math

from torch import Tensor, cat
from torch.nn.functional import interpolate

# Of the class token and a teacher's token, which have no place in the image.
MOST_TOKENS = 2


def resize_positions(positions: Tensor, count: int) -> Tensor:
    """Position embeddings [1, count, width] from those of another number of patches.

    Patches form a square. Their embeddings are interpolated as transformers' ViT does when it is
    given images of another size (ViTEmbeddings.interpolate_pos_encoding): bicubic, without
    antialiasing. Those of other tokens, which come first, stay. Raises ValueError if the numbers
    are not those of squares.
    """
    tokens, old, new = _sides(positions.shape[1], count)
    grid = positions[:, tokens:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return cat([positions[:, :tokens].float(), resized.flatten(2).transpose(1, 2)], dim=1)


def _sides(before: int, after: int) -> tuple[int, int, int]:
    """The number of tokens that are no patches, and the sides of both squares."""
    for tokens in range(MOST_TOKENS + 1):
        old, new = math.isqrt(before - tokens), math.isqrt(after - tokens)
        if (old**2, new**2) == (before - tokens, after - tokens):
            return tokens, old, new
    raise ValueError(f"its {before} position embeddings cannot become {after}")
