"""Decoding, resizing and encoding of photographs, against Pillow and by hand."""

import base64
import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, JpegImagePlugin

from stages.imaging.jpeg import ImageError, Pixels, decode, decode_into, encode, resize
from tests.conftest import REPOSITORY, image_file, jpeg_file, picture

# pytest shows or hides Pillow's warnings; one test below looks without pytest.
pytestmark = pytest.mark.filterwarnings("ignore")

# 24x16 pixels of (10 x, 16 y, 128), with arithmetic coding, which Pillow cannot write.
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQNDAsLDBkSEw8UHRofHh0aHBwgJC4nICIsIxwc"
    "KDcpLDAxNDQ0Hyc5PTgyPC4zNDL/2wBDAQkJCQwLDBgNDRgyIRwhMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIy"
    "MjIyMjIyMjIyMjIyMjIyMjIyMjL/yQARCAAQABgDASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/ALKs"
    "inyQXPSUGO84xFRYi/yw6UCFU/FH0NshkOx6fK1r77nYeJveXvOBBQIfQB2QrP/Z"
)


def pillow_pixels(data: bytes) -> Pixels:
    """Pillow's pixels of the file, upright."""
    with Image.open(io.BytesIO(data)) as image:
        pixels: Pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    return pixels


def painted(mode: str = "RGB", width: int = 61, height: int = 43) -> Image.Image:
    return Image.fromarray(picture(width, height)).convert(mode)


def with_jpeg_size(data: bytes, width: int, height: int) -> bytes:
    """The file with another size in its header."""
    position = data.index(b"\xff\xc0") + 5
    return data[:position] + struct.pack(">HH", height, width) + data[position + 4 :]


def with_segment(data: bytes, marker: int, content: bytes, before: bytes = b"\xff\xdb") -> bytes:
    """The JPEG with one more segment before the first segment with the marker `before`."""
    position = data.index(before)
    segment = struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
    return data[:position] + segment + data[position:]


def exif_with(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


# Bytes, since saving AVIF removes the orientation from an Exif object.
ROTATED = exif_with(6)


def animation(file_format: str) -> bytes:
    more = [painted().transpose(Image.Transpose.ROTATE_180), painted("L").convert("RGB")]
    return image_file(painted(), file_format, save_all=True, append_images=more)


def png_file(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def with_png_size(data: bytes, width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def difference(one: Pixels, two: Pixels) -> Pixels:
    apart: Pixels = np.maximum(one, two) - np.minimum(one, two)
    return apart


@pytest.mark.parametrize(
    ("mode", "file_format", "options"),
    [
        ("RGB", "JPEG", {"quality": 95, "subsampling": 0}),
        ("RGB", "JPEG", {"subsampling": 1, "restart_marker_blocks": 2}),
        ("RGB", "JPEG", {"progressive": True, "optimize": True, "exif": ROTATED}),
        ("RGB", "JPEG", {"keep_rgb": True}),
        ("L", "JPEG", {"exif": ROTATED}),
        ("RGB", "PNG", {"exif": ROTATED}),
        ("L", "PNG", {"transparency": 30}),
        ("P", "PNG", {"transparency": bytes(range(256))}),
        ("1", "PNG", {}),
        ("P", "GIF", {"transparency": 3}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("RGB", "WEBP", {"exif": ROTATED}),
        ("RGB", "AVIF", {"exif": ROTATED}),
        ("P", "BMP", {}),
    ],
)
def test_pixels_are_those_of_pillow(mode: str, file_format: str, options: dict[str, Any]) -> None:
    data = image_file(painted(mode), file_format, **options)

    pixels = decode(data)

    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, pillow_pixels(data))
    pixels[0, 0] = 0  # it is writable


@pytest.mark.parametrize("adobe_transform", [0, 2], ids=["CMYK", "YCCK"])
def test_pixels_of_cmyk_are_those_of_pillow_except_for_rounding(adobe_transform: int) -> None:
    data = image_file(painted("CMYK"), quality=95, subsampling=0)
    position = data.index(b"Adobe") + 11
    data = data[:position] + bytes([adobe_transform]) + data[position + 1 :]

    assert difference(decode(data), pillow_pixels(data)).max() <= 1
    if adobe_transform == 0:
        assert difference(decode(data), picture(61, 43)).mean() < 3


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "MPO"])
def test_the_first_picture_of_an_animation_is_decoded(file_format: str) -> None:
    data = animation(file_format)

    np.testing.assert_array_equal(decode(data), pillow_pixels(data))
    assert difference(decode(data), picture(61, 43)).mean() < 10


def test_a_grey_picture_of_16_bits_is_as_bright_as_a_person_sees_it() -> None:
    samples = np.arange(61 * 43, dtype=np.uint16).reshape(43, 61) * 25

    pixels = decode(image_file(Image.fromarray(samples), "PNG", exif=ROTATED))

    expected = np.rot90((samples / 257).round().astype(np.uint8), -1)
    assert difference(pixels, expected[:, :, np.newaxis].repeat(3, axis=2)).max() <= 1


def test_arithmetic_coding_is_decoded() -> None:
    across, down = np.meshgrid(np.arange(24) * 10, np.arange(16) * 16)
    expected = np.stack([across, down, np.full_like(across, 128)], axis=2).astype(np.uint8)

    assert difference(decode(ARITHMETIC), expected).mean() < 8


#: Photographs with an orientation.
TURNED = {
    f"EXIF {orientation}": image_file(painted(), exif=exif_with(orientation))
    for orientation in range(1, 9)
} | {
    "before JFIF": with_segment(image_file(painted()), 0xE1, exif_with(6), b"\xff\xe0"),
    "just before the data": with_segment(image_file(painted()), 0xE1, exif_with(6), b"\xff\xda"),
    "behind a long comment": with_segment(
        image_file(painted(), exif=ROTATED), 0xFE, b"c" * 60_000, b"\xff\xe1"
    ),
    "XMP attribute": image_file(painted(), xmp=b'<x tiff:Orientation="6"/>'),
    "XMP element": image_file(painted(), xmp=b"<tiff:Orientation>6</tiff:Orientation>"),
    "EXIF before XMP": image_file(painted(), exif=ROTATED, xmp=b'<x tiff:Orientation="3"/>'),
}


@pytest.mark.parametrize("data", TURNED.values(), ids=TURNED.keys())
def test_every_orientation_is_made_upright(data: bytes) -> None:
    plain = decode(image_file(painted()))

    np.testing.assert_array_equal(decode(data), pillow_pixels(data))
    assert np.array_equal(decode(data), plain) == (data is TURNED["EXIF 1"])


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b"\xff\xe1\0\x20" + exif_with(6),
        lambda data: with_segment(data, 0xFE, exif_with(6)),
        lambda data: with_segment(data, 0xE1, b"Exif\0\0"),
        lambda data: with_segment(data, 0xE1, b"Exif\0\0garbage of a camera"),
        lambda data: with_segment(data, 0xE1, exif_with(6)[:-6]),
        lambda data: with_segment(data, 0xE1, exif_with(9)),
        # An orientation that claims to be text, not a number.
        lambda data: with_segment(
            data, 0xE1, exif_with(6).replace(b"\x01\x12\0\x03", b"\x01\x12\0\x02")
        ),
    ],
    ids=["after the picture", "in a comment", "empty", "garbage", "cut", "9", "text"],
)
def test_without_a_sound_orientation_a_picture_stays_as_it_is(
    change: Callable[[bytes], bytes],
) -> None:
    data = image_file(painted())

    np.testing.assert_array_equal(decode(change(data)), decode(data))


def test_broken_exif_of_other_formats_leaves_the_picture_as_it_is() -> None:
    data = image_file(painted(), "PNG", exif=b"Exif\0\0garbage of a camera")

    np.testing.assert_array_equal(decode(data), picture(61, 43))


@pytest.mark.parametrize(
    "padded",
    [
        lambda data: data + b"\0" * 5000,
        lambda data: data + jpeg_file(),
        lambda data: data[:-2] + b"\0" * 300 + data[-2:],
    ],
    ids=["zeros after the end", "another JPEG after the end", "zeros before the end"],
)
def test_superfluous_bytes_do_not_matter(padded: Callable[[bytes], bytes]) -> None:
    data = image_file(painted())

    np.testing.assert_array_equal(decode(padded(data)), decode(data))


@pytest.mark.parametrize(
    ("data", "end_mark"),
    [
        (image_file(painted()), 2),
        (image_file(painted(), progressive=True), 2),
        (image_file(painted(), exif=ROTATED), 2),
        (image_file(painted(), "PNG"), 20),
    ],
    ids=["baseline", "progressive", "EXIF", "PNG"],
)
def test_a_truncated_photograph_is_refused_wherever_it_ends(data: bytes, end_mark: int) -> None:
    decode(data)

    for end in range(1, len(data) - end_mark, 11):
        with pytest.raises(ImageError):
            decode(data[:end])


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize(
    "data",
    [
        image_file(painted()),
        image_file(painted(), exif=ROTATED),
        image_file(painted("L")),
        image_file(painted("CMYK")),
        image_file(painted(), restart_marker_blocks=1),
    ],
    ids=["colour", "EXIF", "grey", "CMYK", "restarts"],
)
def test_a_whole_picture_may_lack_its_end_mark(data: bytes, cut: int) -> None:
    np.testing.assert_array_equal(decode(data[:-cut]), decode(data))


def one_scan_of_several() -> bytes:
    data = image_file(painted(), progressive=True)
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    # The tables of the second scan come before it.
    return data[: data.rindex(b"\xff\xc4", 0, second)]


def before_a_restart() -> bytes:
    data = image_file(painted(), restart_marker_blocks=1)
    return data[: data.index(b"\xff\xd3")]


@pytest.mark.parametrize(
    "data", [one_scan_of_several(), before_a_restart()], ids=["scan", "restart"]
)
def test_a_picture_that_is_cut_between_its_parts_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match="truncated or damaged"):
        decode(data)


def between_restarts() -> bytes:
    data = image_file(painted(), restart_marker_blocks=1)
    return data[: data.index(b"\xff\xd1")] + data[data.index(b"\xff\xd3") :]


def with_codes(data: bytes, codes: bytes) -> bytes:
    return data[: data.index(b"\xff\xda") + 14] + codes * 25 + data[-2:]


#: Files that Pillow, or libjpeg, fills up with grey.
DAMAGED = {
    "cut, with an end": image_file(painted())[:-100] + b"\xff\xd9",
    "cut, with EXIF and an end": image_file(painted(), exif=ROTATED)[:-100] + b"\xff\xd9",
    "cut progressive, with an end": image_file(painted(), progressive=True)[:-100] + b"\xff\xd9",
    "taller than its data": with_jpeg_size(image_file(painted()), 61, 400),
    "wider than its data": with_jpeg_size(image_file(painted(), exif=ROTATED), 4800, 43),
    "between restarts": between_restarts(),
    "Huffman codes": with_codes(image_file(painted()), b"\xff\0"),
    "arithmetic codes": with_codes(ARITHMETIC, b"\x81\x5e"),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_photograph_that_lacks_a_piece_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match="undecodable: truncated or damaged"):
        decode(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no bytes"),
        (b"<html><body>503 Slow Down</body></html>", r"not read \(a web page or XML\): save it as"),
        (b"\0" * 4096, "not an image"),
        (b"\xff\xd8\xff", "undecodable: a JPEG with a broken header"),
        (with_jpeg_size(jpeg_file(), 0, 40), "undecodable: a JPEG with a broken header"),
        (jpeg_file().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"), "or of a rare kind"),
        (jpeg_file().replace(b"\xff\xc0", b"\xff\xc3"), "undecodable"),
        (with_jpeg_size(jpeg_file(), 10_000, 9_000), "decompression bomb: 10000x9000 pixels"),
        (with_jpeg_size(jpeg_file(), 20_000, 20_000), "decompression bomb: 20000x20000 pixels"),
        (with_png_size(image_file(painted(), "PNG"), 10_000, 9_000), "bomb: 10000x9000 pixels"),
        (with_png_size(image_file(painted(), "PNG"), 20_000, 20_000), "decompression bomb"),
        (image_file(painted(), "BMP").replace(b"\x18\0\0\0\0\0", b"\x63\0\0\0\0\0", 1), "."),
        (image_file(painted(), "GIF")[:20], "."),
        (image_file(painted(), "WEBP")[:-1], "undecodable"),
        (image_file(painted(), "AVIF")[:-40], "undecodable"),
        (
            image_file(painted(), "TIFF"),
            r"format that is not read \(TIFF or a camera's raw format\)",
        ),
        (image_file(painted(), "JPEG2000"), r"\(JPEG 2000\): save it as JPEG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", r"\(HEIC\): save it as JPEG"),
        (b"%PDF-1.7\n", r"\(PDF\)"),
    ],
    ids=[
        "empty",
        "html",
        "zeros",
        "start of a JPEG",
        "no columns",
        "12 bits",
        "lossless JPEG",
        "large JPEG",
        "huge JPEG",
        "large PNG",
        "huge PNG",
        "odd BMP",
        "cut GIF",
        "cut WebP",
        "cut AVIF",
        "TIFF",
        "JPEG 2000",
        "HEIC",
        "PDF",
    ],
)
def test_anything_but_a_whole_picture_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(data)


#: Files about which Pillow warns.
WARNED = {
    "transparent palette": image_file(painted("P"), "PNG", transparency=bytes(range(256))),
    "bomb": with_png_size(image_file(painted(), "PNG"), 10_000, 9_000),
    "cut EXIF": with_segment(image_file(painted()), 0xE1, exif_with(6)[:-6]),
    "malformed MPO": with_segment(image_file(painted(), exif=ROTATED), 0xE2, b"MPF\0II*\0"),
}
DECODE_ALL = """
import sys
from pathlib import Path
from stages.imaging import jpeg
for path in sys.argv[1:]:
    try:
        print(jpeg.decode(Path(path).read_bytes()).shape)
    except jpeg.ImageError as error:
        print(error)
"""


def test_pillows_warnings_are_not_seen_and_change_nothing(tmp_path: Path) -> None:
    for name, data in WARNED.items():
        (tmp_path / name).write_bytes(data)

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", DECODE_ALL, *(tmp_path / name for name in WARNED)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )

    shapes = ["(43, 61, 3)", "(43, 61, 3)", "(61, 43, 3)"]
    shapes.insert(1, "decompression bomb: 10000x9000 pixels")
    assert done.stdout.splitlines() == shapes


@pytest.mark.parametrize(
    ("data", "failing"),
    [
        (image_file(painted(), "PNG"), "convert"),
        (image_file(painted(), exif=ROTATED), "getexif"),
        (image_file(painted(), exif=ROTATED), "transpose"),
    ],
    ids=["pixels", "EXIF", "turning"],
)
def test_a_shortage_of_memory_is_not_blamed_on_the_photograph(
    data: bytes, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, failing, fail)

    with pytest.raises(MemoryError):
        decode(data)


@pytest.mark.parametrize("fit", ["squeeze", "pad"])
@pytest.mark.parametrize("size", [(500, 420), (10, 7), (1, 5000), (5000, 1), (1, 1), (2, 65_500)])
def test_every_shape_becomes_a_square(size: tuple[int, int], fit: str) -> None:
    resized = resize(picture(*size), 64, fit)

    assert resized.shape == (64, 64, 3)
    assert resized.dtype == np.uint8
    assert resized.flags.c_contiguous


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (200, 100, (0, 16, 64, 48)),
        (100, 200, (16, 0, 48, 64)),
        (500, 420, (0, 5, 64, 58)),
        (5000, 1, (0, 31, 64, 32)),
        (1, 5000, (31, 0, 32, 64)),
        (1, 1, (0, 0, 64, 64)),
    ],
)
def test_padding_keeps_the_aspect_ratio_centred_on_black_and_squeezing_fills_the_square(
    width: int, height: int, box: tuple[int, int, int, int]
) -> None:
    left, top, right, bottom = box
    expected = np.zeros((64, 64, 3), np.uint8)
    expected[top:bottom, left:right] = 255
    white = np.full((height, width, 3), 255, np.uint8)

    np.testing.assert_array_equal(resize(white, 64, "pad"), expected)
    assert (resize(white, 64, "squeeze") == 255).all()


@pytest.mark.parametrize("fit", ["squeeze", "pad"])
@pytest.mark.parametrize(("width", "height"), [(320, 240), (333, 100)])
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


def test_real_photographs_are_decoded_and_resized_like_pillow_does(abid: Path) -> None:
    for path in sorted((abid / "originals-1k/bin-images").glob("*.jpg"))[::200]:
        pixels = decode(path.read_bytes())
        np.testing.assert_array_equal(pixels, pillow_pixels(path.read_bytes()))
        bicubic = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)
        assert difference(resize(pixels, 224, "squeeze"), np.asarray(bicubic)).max() <= 2


def test_a_better_quality_is_nearer_and_larger_and_pillow_reads_it() -> None:
    pixels = picture(64, 48)

    files = [encode(pixels, quality) for quality in (1, 50, 90, 100)]

    for data in files:
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (64, 48), "RGB")
            assert JpegImagePlugin.get_sampling(image) == 2  # 4:2:0
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
