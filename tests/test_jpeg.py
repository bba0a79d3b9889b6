import base64
import io
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps, JpegImagePlugin

from stages.imaging import jpeg
from stages.imaging.jpeg import ImageError, Pixels, decode, decode_into, encode, resize
from tests.conftest import image_file, jpeg_file, picture

ROTATED = Image.Exif()
ROTATED[0x0112] = 6
FILTERS: list[Literal["error", "default", "always"]] = ["error", "default", "always"]
# 24x16 pixels of (10 x, 16 y, 128), with arithmetic coding, which Pillow cannot write.
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQNDAsLDBkSEw8UHRofHh0aHBwgJC4nICIsIxwc"
    "KDcpLDAxNDQ0Hyc5PTgyPC4zNDL/2wBDAQkJCQwLDBgNDRgyIRwhMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIy"
    "MjIyMjIyMjIyMjIyMjIyMjIyMjL/yQARCAAQABgDASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/ALKs"
    "inyQXPSUGO84xFRYi/yw6UCFU/FH0NshkOx6fK1r77nYeJveXvOBBQIfQB2QrP/Z"
)


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


def with_segment(data: bytes, marker: int, content: bytes, before: bytes = b"\xff\xdb") -> bytes:
    """The JPEG with one more segment, in front of the first with the marker `before`."""
    place = data.index(before)
    segment = struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
    return data[:place] + segment + data[place:]


def without_adobe(data: bytes) -> bytes:
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]


def with_adobe_transform(data: bytes, transform: int) -> bytes:
    place = data.index(b"Adobe") + 11
    return data[:place] + bytes([transform]) + data[place + 1 :]


def exif_with(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def exif_of_text() -> bytes:
    """With an orientation that is said to be text, not a number."""
    return exif_with(6).replace(b"\x01\x12\0\x03", b"\x01\x12\0\x02")


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


def png_of_16_bits(color_type: int, samples: NDArray[np.uint16]) -> bytes:
    """A PNG of `samples` [height, width, channels]; Pillow writes only grey ones of 16 bits."""
    height, width, _ = samples.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    return png_file([(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")])


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
        ("RGB", "JPEG", {"keep_rgb": True}),
        ("RGB", "JPEG", {"restart_marker_blocks": 2}),
        ("RGB", "JPEG", {"optimize": True, "exif": ROTATED, "progressive": True}),
        ("LA", "PNG", {}),
        ("L", "PNG", {"bits": 4}),
        ("RGB", "PNG", {"exif": ROTATED}),
        ("RGB", "PNG", {"transparency": (1, 2, 3)}),
        ("L", "PNG", {"transparency": 30}),
        ("P", "PNG", {"transparency": 3}),
        ("P", "PNG", {"transparency": bytes(range(256))}),
        ("P", "GIF", {"transparency": 3}),
        ("1", "GIF", {}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("RGB", "WEBP", {"exif": ROTATED}),
        ("P", "BMP", {}),
        ("1", "BMP", {}),
    ],
)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_pixels_are_those_of_pillow(mode: str, file_format: str, options: dict[str, Any]) -> None:
    data = image_file(painted(mode), file_format, **options)
    pixels = decode(data)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, pillow_pixels(data))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        bytes,
        without_adobe,
        lambda data: with_adobe_transform(data, 1),
        lambda data: with_adobe_transform(data, 2),
    ],
    ids=["CMYK inverted by Adobe", "without Adobe's segment", "unknown transform", "YCCK"],
)
def test_pixels_of_cmyk_are_those_of_pillow_but_for_rounding(
    change: Callable[[bytes], bytes], progressive: bool
) -> None:
    data = change(image_file(painted("CMYK"), progressive=progressive))
    assert difference(decode(data), pillow_pixels(data)).max() <= 1


def test_cmyk_is_not_inverted() -> None:
    data = image_file(painted("CMYK"), quality=95, subsampling=0)
    assert difference(decode(data), picture(61, 43)).mean() < 3


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "MPO"])
def test_an_animation_is_its_first_picture(file_format: str) -> None:
    data = animation(file_format)
    np.testing.assert_array_equal(decode(data), pillow_pixels(data))
    assert difference(decode(data), picture(61, 43)).mean() < 10


def test_transparency_is_ignored() -> None:
    image = painted("RGBA")
    image.putalpha(Image.fromarray(picture(61, 43)[:, :, 0]))
    for data in (image_file(image, "PNG"), image_file(image, "WEBP", lossless=True, exact=True)):
        np.testing.assert_array_equal(decode(data), picture(61, 43))


SAMPLES = np.arange(61 * 43, dtype=np.uint16).reshape(43, 61, 1) * 25


@pytest.mark.parametrize(
    ("color_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["L", "RGB", "LA", "RGBA"]
)
def test_16_bits_are_as_bright_as_a_person_sees_them(color_type: int, channels: int) -> None:
    samples = SAMPLES.repeat(channels, axis=2)
    pixels = decode(png_of_16_bits(color_type, samples))
    expected = (SAMPLES / 257).round().astype(np.uint8).repeat(3, axis=2)
    assert difference(pixels, expected).max() <= 1
    assert pixels.max() - pixels.min() > 250


def test_a_grey_picture_of_16_bits_is_made_upright() -> None:
    image = Image.fromarray(SAMPLES[:, :, 0])
    pixels = decode(image_file(image, "PNG", exif=ROTATED))
    np.testing.assert_array_equal(pixels, np.rot90(decode(image_file(image, "PNG")), -1))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (8, 8), (65_500, 1)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": ROTATED}])
def test_every_size_is_decoded(size: tuple[int, int], options: dict[str, Any]) -> None:
    data = image_file(painted("RGB", *size), **options)
    np.testing.assert_array_equal(decode(data), pillow_pixels(data))


def test_arithmetic_coding_is_decoded() -> None:
    across, down = np.meshgrid(np.arange(24) * 10, np.arange(16) * 16)
    expected = np.stack([across, down, np.full_like(across, 128)], axis=2).astype(np.uint8)
    assert difference(decode(ARITHMETIC), expected).mean() < 8
    np.testing.assert_array_equal(decode(ARITHMETIC), pillow_pixels(ARITHMETIC))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_made_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = image_file(painted(), exif=exif)
    assert decode(data).shape[:2] == ((43, 61) if orientation < 5 else (61, 43))
    assert decode(data).flags.c_contiguous
    np.testing.assert_array_equal(decode(data), pillow_pixels(data))


def test_exif_behind_a_long_comment_is_seen() -> None:
    data = image_file(painted(), exif=ROTATED)
    comment = b"\xff\xfe" + struct.pack(">H", 5002) + b"c" * 5000
    start = data.index(b"\xff\xe1")
    data = data[:start] + comment + data[start:]
    np.testing.assert_array_equal(decode(data), pillow_pixels(data))


@pytest.mark.parametrize("before", [b"\xff\xe0", b"\xff\xdb", b"\xff\xc0", b"\xff\xda"])
def test_exif_is_seen_wherever_it_is(before: bytes) -> None:
    data = with_segment(image_file(painted()), 0xE1, exif_with(6), before)
    assert decode(data).shape == (61, 43, 3)
    np.testing.assert_array_equal(decode(data), pillow_pixels(data))


@pytest.mark.parametrize(
    "xmp", [b'<x tiff:Orientation="6"/>', b"<tiff:Orientation>6</tiff:Orientation>"]
)
def test_an_orientation_of_xmp_is_made_upright(xmp: bytes) -> None:
    data = image_file(painted(), xmp=xmp)
    assert decode(data).shape == (61, 43, 3)
    np.testing.assert_array_equal(decode(data), pillow_pixels(data))


def test_an_orientation_of_exif_is_before_one_of_xmp() -> None:
    data = image_file(painted(), exif=exif_with(3), xmp=b'<x tiff:Orientation="6"/>')
    np.testing.assert_array_equal(decode(data), decode(image_file(painted()))[::-1, ::-1])


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b"\xff\xe1\0\x20" + exif_with(6),
        lambda data: with_segment(data, 0xFE, exif_with(6)),
        lambda data: with_segment(data, 0xE2, exif_with(6)),
        lambda data: with_segment(data, 0xE1, b"Exif\0\0"),
        lambda data: with_segment(data, 0xE1, b"Exif\0\0garbage of a camera"),
        lambda data: with_segment(data, 0xE1, exif_with(6)[:-6]),
        lambda data: with_segment(data, 0xE1, exif_with(0)),
        lambda data: with_segment(data, 0xE1, exif_with(9)),
        lambda data: with_segment(data, 0xE1, exif_of_text()),
        lambda data: with_segment(data, 0xE1, b"http://ns.adobe.com/xap/1.0/\0tiff:Orientation"),
    ],
    ids=[
        "after the picture",
        "in a comment",
        "in another segment",
        "empty",
        "garbage",
        "cut",
        "0",
        "9",
        "text",
        "XMP without a number",
    ],
)
def test_what_is_no_orientation_leaves_the_picture_as_it_is(
    change: Callable[[bytes], bytes],
) -> None:
    data = image_file(painted())
    np.testing.assert_array_equal(decode(change(data)), decode(data))


def test_broken_exif_of_other_formats_leaves_the_picture_as_it_is() -> None:
    data = image_file(painted(), "PNG", exif=b"Exif\0\0garbage of a camera")
    np.testing.assert_array_equal(decode(data), picture(61, 43))


def test_what_only_pillow_stumbles_over_has_no_orientation(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError

    monkeypatch.setattr(Image, "open", fail)
    np.testing.assert_array_equal(
        decode(image_file(painted(), exif=ROTATED)), decode(image_file(painted()))
    )


@pytest.mark.parametrize(
    "trailer",
    [b"trailing bytes", b"\0" * 5000, b"<html>", jpeg_file()],
    ids=["text", "zeros", "HTML", "another JPEG"],
)
def test_bytes_after_the_picture_do_not_matter(trailer: bytes) -> None:
    data = image_file(painted())
    np.testing.assert_array_equal(decode(data + trailer), decode(data))


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


@pytest.mark.parametrize("options", [{}, {"exif": ROTATED}, {"progressive": True}])
@pytest.mark.parametrize("cut", [10, 100, 300])
def test_a_truncated_photograph_is_refused_though_something_marks_its_end(
    options: dict[str, Any], cut: int
) -> None:
    data = image_file(painted(), **options)[:-cut] + b"\xff\xd9"
    with pytest.raises(ImageError, match=r"undecodable: .*truncated"):
        decode(data)


@pytest.mark.parametrize("options", [{}, {"exif": ROTATED}])
def test_a_header_of_many_more_pixels_than_there_are_data_is_refused(
    options: dict[str, Any],
) -> None:
    for width, height in [(61, 400), (4800, 43), (500, 420)]:
        data = with_jpeg_size(image_file(painted(), **options), width, height)
        # Pillow takes the rest for grey.
        assert pillow_pixels(data).size == width * height * 3
        with pytest.raises(ImageError, match="undecodable: truncated or damaged"):
            decode(data)


def test_a_piece_missing_between_restart_markers_is_refused() -> None:
    data = image_file(painted(), restart_marker_blocks=1)
    start, end = data.index(b"\xff\xd1"), data.index(b"\xff\xd3")
    with pytest.raises(ImageError, match=r"truncated or damaged \(.*instead of RST"):
        decode(data[:start] + data[end:])


@pytest.mark.parametrize(
    ("data", "codes"),
    [(image_file(painted()), b"\xff\0"), (ARITHMETIC, b"\x81\x5e")],
    ids=["Huffman", "arithmetic"],
)
def test_impossible_codes_are_refused(data: bytes, codes: bytes) -> None:
    place = data.index(b"\xff\xda") + 14
    with pytest.raises(ImageError, match=r"truncated or damaged \(.*bad \w+ code"):
        decode(data[:place] + codes * 25 + data[-2:])


def test_superfluous_bytes_before_the_end_do_not_matter() -> None:
    data = image_file(painted())
    padded = data[:-2] + b"\0" * 300 + data[-2:]
    np.testing.assert_array_equal(decode(padded), decode(data))


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
        (image_file(painted(), "WEBP")[:-1], "undecodable"),
        (image_file(painted(), "TIFF"), "not an image"),
        (image_file(painted(), "JPEG2000"), "not an image"),
        (b"\xff\xd8\xff\xd9", "undecodable: a JPEG with a broken header"),
        (with_jpeg_size(jpeg_file(), 0, 40), "undecodable: a JPEG with a broken header"),
        (jpeg_file().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"), "or of a rare kind"),
        (jpeg_file().replace(b"\xff\xc0", b"\xff\xc3"), "undecodable"),
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
        "cut WebP",
        "TIFF",
        "JPEG 2000",
        "no frame",
        "no columns",
        "12 bits",
        "lossless JPEG",
    ],
)
def test_what_is_no_whole_picture_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(data)


@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 1_500)])
def test_more_pixels_than_the_limit_are_refused_with_their_size(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="decompression bomb: {}x{} pixels".format(*size)):
        decode(with_jpeg_size(jpeg_file(), *size))


def scans_of_refinement(scans: int) -> bytes:
    """A JPEG of 2000x2000 pixels of one colour, with its last scan, of 16 bytes, over and over."""
    data = image_file(Image.new("RGB", (2000, 2000), (90, 120, 150)), progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * scans + data[-2:]


@pytest.mark.parametrize("hidden", [False, True])
def test_more_scans_than_any_encoder_writes_are_refused_at_once(hidden: bool) -> None:
    data = scans_of_refinement(5000)
    if hidden:
        # What looks like the end of the picture, in a comment, and a marker without a length.
        data = with_segment(data, 0xFE, b"\xff\xd9", b"\xff\xc4")
        data = data.replace(b"\xff\xda", b"\xff\x01\xff\xda")
    start = time.process_time()
    with pytest.raises(ImageError, match=r"decompression bomb: 2000x2000 pixels in 50\d\d scans"):
        decode(data)
    assert time.process_time() - start < 5


def test_bytes_that_look_like_scans_are_none() -> None:
    """A phone's film behind the picture, and the picture of an embedded profile."""
    data = scans_of_refinement(0)
    comment = with_segment(data, 0xFE, b"\xff\xda" * 30_000)
    for more in (comment, data + b"\xff\xda" * 5000):
        np.testing.assert_array_equal(decode(more), decode(data))


def png_with_odd_animation() -> bytes:
    data = image_file(painted(), "PNG")
    signature = len(png_file([]))
    return data[:33] + png_file([(b"acTL", bytes(8))])[signature:] + data[33:]


#: Files about which Pillow warns.
WARNED = {
    "transparent palette": image_file(painted("P"), "PNG", transparency=bytes(range(256))),
    "bomb": with_png_size(image_file(painted(), "PNG"), 10_000, 10_000),
    "cut EXIF": with_segment(image_file(painted()), 0xE1, exif_with(6)[:-6]),
    "malformed MPO": with_segment(image_file(painted(), exif=ROTATED), 0xE2, b"MPF\0II*\0"),
    "odd APNG": png_with_odd_animation(),
}


def result_of(data: bytes) -> Any:
    try:
        return decode(data).tolist()
    except ImageError as error:
        return str(error)


@pytest.mark.parametrize("data", WARNED.values(), ids=WARNED.keys())
def test_pillows_warnings_are_not_seen_and_change_nothing(
    data: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(), suppress(Exception):
        pillow_pixels(data)
    results = []
    for action in FILTERS:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter(action)
            results.append(result_of(data))
        assert not seen
    assert results[1:] == results[:-1]
    assert capfd.readouterr() == ("", "")


def test_pillows_warnings_are_not_seen_in_threads() -> None:
    data = WARNED["transparent palette"]
    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("error")
        results = list(pool.map(result_of, [data] * 200))
    assert results == results[:1] * 200
    assert results[0] == picture_of(data)


def picture_of(data: bytes) -> Any:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGBA"))[:, :, :3].tolist()


def test_warnings_of_others_are_still_seen() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        decode(WARNED["transparent palette"])
        warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["something else"]


def test_a_shortage_of_memory_is_no_fault_of_the_photograph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: Image.Image) -> Pixels:
        raise MemoryError

    monkeypatch.setattr(jpeg, "_rgb", fail)
    with pytest.raises(MemoryError):
        decode(image_file(painted(), "PNG"))


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
    ("width", "height"),
    [
        (500, 420),
        (420, 500),
        (224, 224),
        (64, 64),
        (10, 7),
        (1, 5000),
        (5000, 1),
        (1, 1),
        (2, 65_500),
    ],
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
        (5000, 1, (0, 31, 64, 32)),
        (1, 5000, (31, 0, 32, 64)),
        (1, 1, (0, 0, 64, 64)),
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


@pytest.mark.parametrize("shape", [(100, 250), (1, 5000), (5000, 1), (1, 1)])
def test_squeezing_fills_the_square(shape: tuple[int, int]) -> None:
    white = np.full((*shape, 3), 255, np.uint8)
    assert (resize(white, 64, "squeeze") == 255).all()


@pytest.mark.parametrize("fit", ["squeeze", "pad"])
@pytest.mark.parametrize("pixels", [picture(5000, 1), picture(1, 5000)])
def test_a_line_keeps_its_colors_in_their_order(pixels: Pixels, fit: str) -> None:
    resized = resize(pixels, 64, fit)
    line = resized[32 - (fit == "pad")] if pixels.shape[0] == 1 else resized[:, 31]
    expected = Image.fromarray(pixels).resize(
        (64, 1) if pixels.shape[0] == 1 else (1, 64), Image.Resampling.BICUBIC
    )
    assert difference(line, np.asarray(expected).reshape(64, 3)).max() <= 2


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
