"""Photographs as bytes and as pixels: decoding what comes, resizing, encoding."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from torch.nn.functional import interpolate

Pixels = NDArray[np.uint8]

#: Above this an image is a decompression bomb; Pillow's own limit, 89 million pixels.
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3
# A progressive JPEG is gone over once a scan, and so many bytes are one; encoders write some ten.
MAX_SCANNED_PIXELS = 20 * MAX_PIXELS
SCAN_BYTES = 23
BOMB = "decompression bomb"
#: Of Pillow's formats those that cameras and the web use. Others run foreign programs (EPS), or
#: fill up what is missing and write to stderr (TIFF).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
JPEG_START = b"\xff\xd8\xff"
START_OF_SCAN = b"\xff\xda"
END_OF_IMAGE = b"\xff\xd9"
# Of EXIF and XMP. Without one a JPEG has no orientation, and nobody needs to look for it.
APP1 = b"\xff\xe1"
# libjpeg's words for a piece of the picture that is not there, which it fills up with grey.
_LOST = re.compile("remature end|bad (Huffman|arithmetic) code|instead of RST")
# But for those without a length: stuffed zeros and fill bytes in compressed data, restarts, TEM.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]", re.DOTALL)
_PILLOW = re.compile(r"PIL\.")


class ImageError(ValueError):
    """The bytes cannot be decoded to a whole picture; the text is the reason."""


def decode(data: bytes) -> Pixels:
    """Decode to RGB, uint8 [height, width, 3], upright as EXIF or XMP says. Raises ImageError.

    Transparency is ignored, and an animation is its first picture. libjpeg-turbo through simplejpeg
    is the fast way; what it refuses (other formats, oddities) goes to Pillow, which decides. But
    a JPEG that lacks a piece is refused here, as Pillow takes some of those.
    """
    try:
        pixels = _decode_jpeg(data)
    except ImageError:
        raise
    except ValueError as error:
        if _LOST.search(str(error)):
            raise ImageError(f"undecodable: truncated or damaged ({error})") from None
        return _decode_with_pillow(data)
    if APP1 not in takewhile(lambda marker: marker != START_OF_SCAN, _markers(data)):
        return pixels
    return _upright(pixels, _orientation_of_jpeg(data))


def _decode_jpeg(data: bytes) -> Pixels:
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    _refuse_bomb(width, height, data)
    pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB")
    return pixels


def _decode_with_pillow(data: bytes) -> Pixels:
    try:
        with _open(data) as image:
            _refuse_bomb(image.width, image.height, data)
            return _upright(_rgb(image), _orientation(image))
    # A shortage of memory is the machine's fault: the photograph may be good.
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError(_why_unidentified(data)) from None
    except Image.DecompressionBombError:
        raise ImageError(BOMB) from None
    # Pillow's decoders raise many kinds for broken bytes: OSError, SyntaxError, struct.error, ...
    except Exception as error:  # noqa: BLE001
        raise ImageError(f"undecodable: {str(error) or type(error).__name__}") from None


def _open(data: bytes) -> Image.Image:
    """Without Pillow's warnings: they tell a user nothing, and are exceptions under -W error.

    Not by warnings.catch_warnings, which is not for threads; and at each use, as filters that
    somebody sets later come before this one.
    """
    if warnings.filters[:1] != [("ignore", None, Warning, _PILLOW, 0)]:
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _why_unidentified(data: bytes) -> str:
    if data.startswith(JPEG_START):
        return "undecodable: a JPEG with a broken header, or of a rare kind"
    return "not an image" if data else "no bytes"


def _refuse_bomb(width: int, height: int, data: bytes) -> None:
    pixels = width * height
    if pixels > MAX_PIXELS:
        raise ImageError(f"{BOMB}: {width}x{height} pixels")
    # Most files are too short for so many scans, and counting them takes a while.
    if pixels * len(data) // SCAN_BYTES > MAX_SCANNED_PIXELS and data.startswith(JPEG_START):
        scans = _count_scans(data)
        if pixels * scans > MAX_SCANNED_PIXELS:
            raise ImageError(f"{BOMB}: {width}x{height} pixels in {scans} scans")


def _count_scans(data: bytes) -> int:
    """How many scans of a JPEG a decoder goes over."""
    return sum(marker == START_OF_SCAN for marker in _markers(data))


def _markers(data: bytes) -> Iterator[bytes]:
    """Those of a JPEG between its start and its end. ITU-T T.81, B.1.1."""
    place = len(b"\xff\xd8")
    while (marker := _MARKER.search(data, place)) and marker[0] != END_OF_IMAGE:
        yield marker[0]
        length = int.from_bytes(data[marker.end() : marker.end() + 2], "big")
        place = marker.end() + length


def _rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I;16"):
        # Pillow's conversion would make everything above 255 white. Of 16 bits of a colour it
        # takes the upper ones, as here.
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, np.newaxis], 3, axis=2)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _orientation(image: Image.Image) -> object:
    """None where EXIF is broken."""
    with suppress(Exception):
        return image.getexif().get(ExifTags.Base.Orientation)
    return None


def _orientation_of_jpeg(data: bytes) -> object:
    # What Pillow cannot read has none.
    with suppress(Exception), _open(data) as image:
        return _orientation(image)
    return None


def _upright(pixels: Pixels, orientation: object) -> Pixels:
    """Undo an orientation of EXIF, where 1 is upright and from 5 on lines are columns."""
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    return np.ascontiguousarray(pixels)


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
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    image = interpolate(image, (height, width), mode="bicubic", antialias=True)
    resized: Pixels = image[0].permute(1, 2, 0).numpy()
    if fit != "pad":
        return resized
    square = np.zeros((size, size, 3), np.uint8)
    left, top = (size - width) // 2, (size - height) // 2
    square[top : top + height, left : left + width] = resized
    return square


def encode(pixels: Pixels, quality: int) -> bytes:
    data: bytes = simplejpeg.encode_jpeg(pixels, quality, colorsubsampling="420")
    return data


def decode_into(data: bytes | memoryview, pixels: Pixels) -> None:
    """Decode a JPEG of this project's own making into `pixels`, [height, width, 3]."""
    simplejpeg.decode_jpeg(data, "RGB", buffer=pixels)
