"""Photographs as bytes and as pixels: decoding, resizing, encoding."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.nn.functional import interpolate

Pixels = NDArray[np.uint8]

#: Above this an image is a decompression bomb; Pillow's own limit, 89 million pixels.
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3
BOMB = "decompression bomb"
#: Pillow's formats of cameras and the web. Not EPS, which runs another program, and not TIFF, whose
#: decoder fills in missing pieces and writes to stderr.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP")
#: What files of other formats begin with, to name them.
_OTHER_FORMATS = {
    "HEIC": rb".{4}ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)",
    "TIFF or a camera's raw format": rb"II[*+]\0|MM\0[*+]",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\0\0\0\x0cJXL |\xff\x0a",
    "PDF": rb"%PDF",
    "a web page or XML": rb"(\xef\xbb\xbf)?\s*<",
}
JPEG_START = b"\xff\xd8\xff"
START_OF_SCAN = b"\xff\xda"
END_OF_IMAGE = b"\xff\xd9"
# The segment of EXIF and XMP; a JPEG without it has no orientation.
APP1 = b"\xff\xe1"
# libjpeg's words for a missing piece of the picture, which it fills with grey.
_LOST = re.compile("remature end|bad (Huffman|arithmetic) code|instead of RST")

# Pillow's warnings do not help users, and would be exceptions under -W error.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(ValueError):
    """The bytes are not a whole picture; the text says why."""


def decode(data: bytes) -> Pixels:
    """Decode to RGB, uint8 [height, width, 3], upright as EXIF or XMP says. Raises ImageError.

    Transparency is ignored, and only the first picture of an animation is decoded. simplejpeg
    (libjpeg-turbo) is the fast path; what it refuses (other formats, rare kinds of JPEG) goes to
    Pillow. A JPEG that lacks a piece is refused here, since Pillow would accept some of those.
    """
    pixels = _decode_jpeg(data)
    if pixels is not None and APP1 not in data[: data.find(START_OF_SCAN)]:
        return pixels
    with _opened(data) as image:
        return _upright(_rgb(image) if pixels is None else pixels, image)


def _decode_jpeg(data: bytes) -> Pixels | None:
    """None if libjpeg-turbo refuses the file. Raises ImageError if a piece is missing."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        _refuse_bomb(width, height)
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB")
    except ImageError:
        raise
    except ValueError as error:
        if not _LOST.search(str(error)):
            return None
        if not data.endswith(END_OF_IMAGE) and _is_one_scan(data):
            return _decode_jpeg(data.removesuffix(END_OF_IMAGE[:1]) + END_OF_IMAGE)
        raise ImageError(f"undecodable: truncated or damaged ({error})") from None
    return pixels


def _is_one_scan(data: bytes) -> bool:
    """Whether the file's last scan holds the whole picture, as most cameras write it.

    If such a JPEG lacks more than its end mark, libjpeg says so. Of a JPEG with several scans, the
    last ones could be missing, and nobody could tell.
    """
    with _opened(data) as image:
        components = data[data.rfind(START_OF_SCAN) + 4]
        return not image.info.get("progressive") and components == len(image.getbands())


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open the image with Pillow; whatever it raises for broken bytes becomes an ImageError."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse_bomb(image.width, image.height)
            yield image
    # A lack of memory is the machine's fault: the photograph may be good.
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError(_why_unidentified(data)) from None
    except Image.DecompressionBombError:
        raise ImageError(BOMB) from None
    # Pillow's decoders raise many kinds of errors: OSError, SyntaxError, struct.error, ...
    except Exception as error:  # noqa: BLE001
        raise ImageError(f"undecodable: {str(error) or type(error).__name__}") from None


def _why_unidentified(data: bytes) -> str:
    if data.startswith(JPEG_START):
        return "undecodable: a JPEG with a broken header, or of a rare kind"
    for name, start in _OTHER_FORMATS.items():
        if re.match(start, data, re.DOTALL):
            return f"of a format that is not read ({name}): save it as JPEG"
    return "not an image" if data else "no bytes"


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"{BOMB}: {width}x{height} pixels")


def _rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I;16"):
        # Pillow's conversion would make everything above 255 white.
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, np.newaxis], 3, axis=2)
    return np.array(image.convert("RGB"))


def _upright(pixels: Pixels, image: Image.Image) -> Pixels:
    """Turn `pixels` as the image's EXIF or XMP says; if that is broken, leave them."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001
        orientation = None
    if orientation not in range(2, 9):
        return pixels
    turned = Image.fromarray(pixels)
    turned.getexif()[ExifTags.Base.Orientation] = orientation
    return np.array(ImageOps.exif_transpose(turned))


def resize(pixels: Pixels, size: int, fit: str) -> Pixels:
    """Resize [height, width, 3] to [size, size, 3], bicubic with antialiasing.

    `fit` "squeeze" stretches the whole picture onto the square; "pad" keeps its aspect ratio,
    centred on black. Its shorter side is rounded down, as image processors of transformers do.
    """
    height, width, _ = pixels.shape
    if fit == "pad":
        scale = size / max(height, width)
        height, width = max(1, int(height * scale)), max(1, int(width * scale))
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
    """Decode a JPEG that `encode` made into `pixels`, [height, width, 3]."""
    simplejpeg.decode_jpeg(data, "RGB", buffer=pixels)
