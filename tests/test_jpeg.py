import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, JpegImagePlugin

from stages.core.jpeg import ImageError, Pixels, decode, decode_into, encode, resize
from tests.conftest import image_file, jpeg_file, picture

ROTATED = Image.Exif()
ROTATED[0x0112] = 6


def pillow_pixels(data: bytes) -> Pixels:
    """What Pillow makes of the file, upright."""
    with Image.open(io.BytesIO(data)) as image:
        pixels: Pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    return pixels


def painted(mode: str = "RGB", width: int = 61, height: int = 43) -> Image.Image:
    return Image.fromarray(picture(width, height)).convert(mode)


def with_jpeg_size(data: bytes, width: int, height: int) -> bytes:
    """The file, its header saying another size."""
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


def with_png_size(data: bytes, width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def difference(one: Pixels, two: Pixels) -> Pixels:
    larger, smaller = np.maximum(one, two), np.minimum(one, two)
    apart: Pixels = larger - smaller
    return apart


@pytest.mark.parametrize(
    ("mode", "file_format", "options"),
    [
        ("RGB", "JPEG", {"quality": 95, "subsampling": 0}),
        ("RGB", "JPEG", {"quality": 95, "subsampling": 1}),
        ("RGB", "JPEG", {"quality": 75, "subsampling": 2}),
        ("RGB", "JPEG", {"progressive": True}),
        ("L", "JPEG", {}),
        ("L", "JPEG", {"progressive": True}),
        ("RGB", "JPEG", {"exif": ROTATED}),
        ("L", "JPEG", {"exif": ROTATED}),
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("P", "PNG", {}),
        ("1", "PNG", {}),
        ("RGB", "WEBP", {}),
        ("RGB", "BMP", {}),
    ],
)
def test_pixels_are_those_of_pillow(mode: str, file_format: str, options: dict[str, Any]) -> None:
    data = image_file(painted(mode), file_format, **options)
    pixels = decode(data)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, pillow_pixels(data))


@pytest.mark.parametrize("progressive", [False, True])
def test_pixels_of_cmyk_are_those_of_pillow_but_for_rounding(progressive: bool) -> None:
    data = image_file(painted("CMYK"), progressive=progressive)
    assert difference(decode(data), pillow_pixels(data)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_made_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = image_file(painted(), exif=exif)
    assert decode(data).shape[:2] == ((43, 61) if orientation < 5 else (61, 43))
    np.testing.assert_array_equal(decode(data), pillow_pixels(data))


def test_exif_behind_a_long_comment_is_seen() -> None:
    data = image_file(painted(), exif=ROTATED)
    comment = b"\xff\xfe" + struct.pack(">H", 5002) + b"c" * 5000
    start = data.index(b"\xff\xe1")
    data = data[:start] + comment + data[start:]
    np.testing.assert_array_equal(decode(data), pillow_pixels(data))


def test_bytes_after_the_picture_do_not_matter() -> None:
    data = jpeg_file()
    np.testing.assert_array_equal(decode(data + b"trailing bytes"), decode(data))


def test_pixels_can_be_written_to() -> None:
    for data in (jpeg_file(), image_file(painted(), "PNG")):
        decode(data)[0, 0] = 0


@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_photograph_is_refused_wherever_it_ends(progressive: bool) -> None:
    data = image_file(painted(), progressive=progressive)
    decode(data)
    # The last two bytes only mark the end.
    for end in [*range(1, 700, 7), *range(700, len(data) - 2, 31)]:
        with pytest.raises(ImageError):
            decode(data[:end])


def test_a_truncated_png_is_refused_wherever_it_ends() -> None:
    data = image_file(painted(), "PNG")
    for end in range(1, len(data) - 20, 13):
        with pytest.raises(ImageError):
            decode(data[:end])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no bytes"),
        (b"<html><body>503 Slow Down</body></html>", "not an image"),
        (b"\0" * 4096, "not an image"),
        (b"\xff\xd8\xff", "."),
        (jpeg_file()[:-200], "truncated"),
        (with_jpeg_size(jpeg_file(), 20_000, 20_000), "decompression bomb"),
        (with_png_size(image_file(painted(), "PNG"), 20_000, 20_000), "decompression bomb"),
        (image_file(painted(), "BMP").replace(b"\x18\0\0\0\0\0", b"\x63\0\0\0\0\0", 1), "."),
        (image_file(painted(), "GIF")[:20], "."),
    ],
    ids=[
        "empty",
        "html",
        "zeros",
        "start of a JPEG",
        "cut short",
        "huge JPEG",
        "huge PNG",
        "odd BMP",
        "cut GIF",
    ],
)
def test_what_is_no_whole_picture_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 1_500)])
def test_more_pixels_than_the_limit_are_refused_with_their_size(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="decompression bomb: {}x{} pixels".format(*size)):
        decode(with_jpeg_size(jpeg_file(), *size))


def test_damaged_files_give_a_picture_or_an_image_error() -> None:
    chance = np.random.default_rng(0)
    files = [jpeg_file(), *(image_file(painted(), name) for name in ("PNG", "GIF", "BMP", "WEBP"))]
    for data in files:
        for _ in range(100):
            damaged = bytearray(data)
            for _ in range(chance.integers(1, 8)):
                damaged[chance.integers(min(len(data), 300))] = chance.integers(256)
            try:
                pixels = decode(bytes(damaged))
            except ImageError:
                continue
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3


@pytest.mark.parametrize("fit", ["squeeze", "pad"])
@pytest.mark.parametrize(
    ("width", "height"), [(500, 420), (420, 500), (224, 224), (64, 64), (10, 7), (1, 300), (300, 1)]
)
def test_every_shape_becomes_the_square(width: int, height: int, fit: str) -> None:
    resized = resize(picture(width, height), 64, fit)
    assert resized.shape == (64, 64, 3)
    assert resized.dtype == np.uint8
    assert resized.flags.c_contiguous


@pytest.mark.parametrize("fit", ["squeeze", "pad"])
def test_a_square_of_the_size_stays_as_it_is(fit: str) -> None:
    np.testing.assert_array_equal(resize(picture(64, 64), 64, fit), picture(64, 64))


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (200, 100, (0, 16, 64, 48)),
        (100, 200, (16, 0, 48, 64)),
        (64, 64, (0, 0, 64, 64)),
        (500, 420, (0, 5, 64, 59)),
        (1000, 1, (0, 31, 64, 32)),
    ],
)
def test_padding_keeps_the_aspect_ratio_centred_on_black(
    width: int, height: int, box: tuple[int, int, int, int]
) -> None:
    left, top, right, bottom = box
    expected = np.zeros((64, 64, 3), np.uint8)
    expected[top:bottom, left:right] = 255
    white = np.full((height, width, 3), 255, np.uint8)
    np.testing.assert_array_equal(resize(white, 64, "pad"), expected)


def test_squeezing_fills_the_square() -> None:
    white = np.full((100, 250, 3), 255, np.uint8)
    assert (resize(white, 64, "squeeze") == 255).all()


@pytest.mark.parametrize("fit", ["squeeze", "pad"])
@pytest.mark.parametrize(("width", "height"), [(320, 240), (240, 320), (333, 100)])
def test_nothing_is_cropped(width: int, height: int, fit: str) -> None:
    pixels = np.full((height, width, 3), 128, np.uint8)
    edge = 20
    pixels[:edge], pixels[-edge:] = (255, 0, 0), (0, 255, 0)
    pixels[edge:-edge, :edge], pixels[edge:-edge, -edge:] = (0, 0, 255), (255, 255, 0)
    resized = resize(pixels, 64, fit)
    for color in [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]:
        assert (np.abs(resized.astype(int) - color) < 40).all(axis=2).any()


@pytest.mark.parametrize(("width", "height"), [(501, 427), (300, 700), (100, 90)])
def test_resizing_is_close_to_pillows_bicubic(width: int, height: int) -> None:
    pixels = picture(width, height)
    noise = np.random.default_rng(0).integers(-30, 30, pixels.shape)
    pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    bicubic = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)
    differences = difference(resize(pixels, 224, "squeeze"), np.asarray(bicubic))
    assert differences.max() <= 2
    assert differences.mean() < 0.5


def test_real_photographs_are_resized_like_pillow_does(abid: Path) -> None:
    paths = sorted((abid / "originals-1k/bin-images").glob("*.jpg"))[::200]
    for path in paths:
        pixels = decode(path.read_bytes())
        np.testing.assert_array_equal(pixels, pillow_pixels(path.read_bytes()))
        bicubic = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)
        assert difference(resize(pixels, 224, "squeeze"), np.asarray(bicubic)).max() <= 2


def test_encoding_gives_the_same_bytes_in_every_thread() -> None:
    pixels = picture(64, 64)
    with ThreadPoolExecutor(4) as pool:
        files = set(pool.map(lambda _: encode(resize(pixels, 48, "pad"), 90), range(20)))
    assert len(files) == 1


@pytest.mark.parametrize("quality", [1, 50, 90, 100])
def test_an_encoded_picture_is_a_jpeg_that_pillow_reads(quality: int) -> None:
    data = encode(picture(64, 48), quality)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (64, 48), "RGB")
        assert JpegImagePlugin.get_sampling(image) == 2  # 4:2:0


def test_a_better_quality_is_nearer_and_larger() -> None:
    pixels = picture(64, 64)
    files = [encode(pixels, quality) for quality in (10, 50, 90)]
    errors = [difference(decode(data), pixels).mean() for data in files]
    assert sorted(errors, reverse=True) == errors
    assert errors[-1] < 2
    assert sorted(files, key=len) == files


@pytest.mark.parametrize("view", [bytes, memoryview])
def test_decoding_into_a_buffer_gives_the_same_pixels(view: Any) -> None:
    data = encode(picture(64, 48), 90)
    batch = np.zeros((3, 48, 64, 3), np.uint8)
    decode_into(view(data), batch[1])
    np.testing.assert_array_equal(batch[1], decode(data))
    assert not batch[[0, 2]].any()
