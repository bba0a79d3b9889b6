"""Photographs as bytes and as pixels: decoding what comes, resizing, encoding."""

import io

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn.functional import interpolate, pad

Pixels = NDArray[np.uint8]

#: Above this an image is a decompression bomb; Pillow's own limit, 89 million pixels.
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3
BOMB = "decompression bomb"
#: Of Pillow's formats those that cameras and the web use; others run foreign programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class ImageError(ValueError):
    """The bytes cannot be decoded to a whole picture; the text is the reason."""


def decode(data: bytes) -> Pixels:
    """Decode to RGB, uint8 [height, width, 3]. Raises ImageError.

    libjpeg-turbo through simplejpeg is the fast way. What it refuses (other formats, oddities) and
    what EXIF may rotate goes to Pillow, which decides.
    """
    if b"Exif\0\0" not in data:
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            if height * width <= MAX_PIXELS:
                pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB")
                return pixels
        except ValueError:
            pass
    return _decode_with_pillow(data)


def _decode_with_pillow(data: bytes) -> Pixels:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse_bomb(image)
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image" if data else "no bytes") from None
    except Image.DecompressionBombError:
        raise ImageError(BOMB) from None
    # Pillow's decoders raise many kinds for broken bytes: OSError, SyntaxError, struct.error, ...
    except Exception as error:  # noqa: BLE001
        raise ImageError(f"undecodable: {str(error) or type(error).__name__}") from None


def _refuse_bomb(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{BOMB}: {image.width}x{image.height} pixels")


def resize(pixels: Pixels, size: int, fit: str) -> Pixels:
    """Resize [height, width, 3] to [size, size, 3], bicubic with antialiasing.

    `fit` "squeeze" stretches the whole picture onto the square; "pad" keeps its aspect ratio,
    centred on black.
    """
    height, width, _ = pixels.shape
    if fit == "pad":
        scale = size / max(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
    else:
        height, width = size, size
    # A view in channels_last, for which torch's uint8 kernel is vectorized.
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    image = interpolate(image, (height, width), mode="bicubic", antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    image = pad(image, (left, size - width - left, top, size - height - top))
    return np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())


def encode(pixels: Pixels, quality: int) -> bytes:
    data: bytes = simplejpeg.encode_jpeg(pixels, quality, colorsubsampling="420")
    return data


def decode_into(data: bytes | memoryview, pixels: Pixels) -> None:
    """Decode a JPEG of this project's own making into `pixels`, [height, width, 3]."""
    simplejpeg.decode_jpeg(data, "RGB", buffer=pixels)
