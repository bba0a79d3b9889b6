"""Damaged photographs and records: each gives a result or a clear error, soon and in little memory.

The cases are the same in each run. For more cases, which differ in each run:

    FUZZ_CASES=100000 python -m pytest tests/test_fuzz.py
"""

import io
import json
import math
import os
import random
import resource
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import psutil
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stages.collecting.records import INDEX_SCHEMA, MAX_RECORD_BYTES, RecordError, parse_record
from stages.imaging.jpeg import MAX_PIXELS, ImageError, Pixels, decode, resize
from tests.conftest import image_file, record_json
from tests.test_jpeg import (
    ARITHMETIC,
    ROTATED,
    WARNED,
    animation,
    difference,
    painted,
    pillow_pixels,
    png_file,
)
from tests.test_records import record_of, row_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning:PIL")]

CASES = int(os.environ.get("FUZZ_CASES", "0"))
#: Enough for the largest allowed picture, of 89 million pixels.
MOST_MEMORY = 1536 * 2**20
#: In CPU time, which does not depend on other processes.
MOST_SECONDS = 20


def cases(number: int) -> settings:
    """Settings of a test with `number` cases, or FUZZ_CASES."""
    return settings(
        max_examples=CASES or number,
        derandomize=not CASES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """Limit this process to MOST_MEMORY more than it has now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + MOST_MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


Result = TypeVar("Result")
Refusal = TypeVar("Refusal", bound=Exception)


def result_or_refusal(work: Callable[[], Result], kind: type[Refusal]) -> Result | Refusal:
    """The result of `work`, or its error of this kind, within MOST_SECONDS."""
    start = time.process_time()
    result: Result | Refusal
    try:
        result = work()
    except kind as refusal:
        result = refusal
    assert time.process_time() - start < MOST_SECONDS
    return result


CHANCES = st.integers(0, 2**64).map(random.Random)


def damaged(files: Sequence[bytes], words: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    return st.builds(damage, st.sampled_from(files), st.just(words), CHANCES)


def damage(file: bytes, words: Sequence[bytes], chance: random.Random) -> bytes:
    """The file with up to five changes, some of which insert words of its format."""
    data = bytearray(file)
    for _ in range(chance.randint(1, 5)):
        start = chance.randint(0, len(data))
        stop = start + chance.randint(1, 80)
        new = chance.choice([chance.choice(words), chance.randbytes(chance.randint(1, 4))])
        match chance.choice(["change", "change", "insert", "cut", "repeat", "end"]):
            case "change":
                data[start : start + len(new)] = new
            case "insert":
                data[start:start] = new
            case "cut":
                del data[start:stop]
            case "repeat":
                data[start:start] = data[start:stop] * chance.randint(1, 3)
            case "end":
                del data[len(data) - chance.randint(0, 20) :]
    return bytes(data)


def reorder(jpeg: bytes, chance: random.Random) -> bytes:
    """The JPEG's segments in another order, some of them several times and some not at all."""
    start, *parts = segments(jpeg)
    for _ in range(chance.randint(1, 5)):
        parts.insert(chance.randint(0, len(parts)), chance.choice(parts))
        if chance.random() < 0.5:
            del parts[chance.randrange(len(parts))]
    return b"".join([start, *parts])


def segments(jpeg: bytes) -> list[bytes]:
    """A JPEG cut in front of its markers."""
    starts = [
        position
        for position in range(len(jpeg) - 1)
        if jpeg[position] == 0xFF and jpeg[position + 1] not in {0x00, 0xFF}
    ]
    return [jpeg[start:stop] for start, stop in zip(starts, [*starts[1:], None], strict=True)]


SMALL = painted("RGB", 24, 16)
JPEGS = [
    image_file(SMALL),
    image_file(SMALL, progressive=True),
    image_file(SMALL, exif=ROTATED, subsampling=0),
    image_file(SMALL, restart_marker_blocks=1, xmp=b'<x tiff:Orientation="6"/>'),
    image_file(SMALL.convert("L")),
    image_file(SMALL.convert("CMYK")),
    ARITHMETIC,
    *(data for name, data in WARNED.items() if data.startswith(b"\xff\xd8")),
]
OTHERS = [
    *(image_file(SMALL, name) for name in ("PNG", "GIF", "BMP", "WEBP", "MPO")),
    image_file(SMALL, "TIFF", compression="tiff_lzw"),
    image_file(SMALL, "WEBP", lossless=True, exif=ROTATED),
    image_file(SMALL.convert("P"), "PNG", transparency=b"\0\1\2"),
    image_file(Image.fromarray(np.arange(384, dtype=np.uint16).reshape(16, 24)), "PNG"),
    *(animation(name) for name in ("GIF", "WEBP", "PNG")),
]
IMAGE_WORDS = [
    *(bytes([0xFF, marker]) for marker in (0xC0, 0xC2, 0xC3, 0xC4, 0xC9, 0xD0, 0xD8, 0xD9, 0xDA)),
    *(bytes([0xFF, marker]) for marker in (0xDB, 0xDD, 0xE0, 0xE1, 0xE2, 0xEE, 0xFE, 0x01, 0x00)),
    *(b"\0\0", b"\xff\xff", b"\xff\xff\xff\xff", b"\0\2", b"\x20\x20", b"Exif\0\0", b"II*\0"),
    *(b"IHDR", b"IDAT", b"IEND", b"PLTE", b"tRNS", b"eXIf", b"iCCP", b"zTXt", b"acTL", b"fcTL"),
    *(b"RIFF", b"VP8X", b"VP8L", b"ANIM", b"ALPH", b"GIF89a", b"NETSCAPE2.0", b"BM", b"Adobe"),
]
PICTURES = (
    damaged(JPEGS, IMAGE_WORDS)
    | damaged(OTHERS, IMAGE_WORDS)
    | st.builds(reorder, st.sampled_from(JPEGS), CHANCES)
)


@cases(2000)
@given(data=PICTURES)
def test_a_damaged_photograph_is_a_picture_or_an_image_error(
    capfd: pytest.CaptureFixture[str], data: bytes
) -> None:
    pixels = result_or_refusal(lambda: decode(data), ImageError)
    assert capfd.readouterr() == ("", "")
    if isinstance(pixels, ImageError):
        assert str(pixels)
        return
    assert pixels.dtype == np.uint8
    assert pixels.shape[2:] == (3,)
    assert 0 < pixels.size <= 3 * MAX_PIXELS
    assert resize(pixels, 8, "pad").shape == (8, 8, 3)
    seen = pixels_of_pillow(data)
    if seen is not None:
        assert seen.shape == pixels.shape
        # Except for the rounding of CMYK.
        assert difference(seen, pixels).max() <= 2


def pixels_of_pillow(data: bytes) -> Pixels | None:
    """Pillow's pixels, or None if it refuses them or shows 16 bits wrongly."""
    with suppress(Exception), Image.open(io.BytesIO(data)) as image:
        return None if image.mode == "I;16" else pillow_pixels(data)
    return None


def png_of_zeros(width: int, height: int) -> bytes:
    """A transparent picture, whose file has a thousandth of the size of its pixels."""
    packer = zlib.compressobj()
    line = bytes(1 + 4 * width)
    lines = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return png_file([(b"IHDR", header), (b"IDAT", lines), (b"IEND", b"")])


def test_the_largest_picture_fits_into_the_memory() -> None:
    data = png_of_zeros(9459, 9459)
    assert len(data) < 2**20
    assert decode(data).shape == (9459, 9459, 3)


RECORD_WORDS = [
    *(b'"EXPECTED_QUANTITY":', b'"BIN_FCSKU_DATA":', b'"quantity":', b'"asin":', b'"value":'),
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"null", b"true", b"1e400", b"-1", b"1.5", b"NaN"),
    *(b"99999999999999999999", b"\\u0000", b"\\ud800", b"\\u0045", b"\xff", b"\0", b"\xef\xbb\xbf"),
]
RECORDS = [
    record_of(),
    record_of(weight=None, name='"\\u00e9'),
    record_json(3, ["B1", "B2"], a=[1]),
]


@cases(1500)
@given(damaged(RECORDS, RECORD_WORDS))
def test_a_damaged_record_is_a_row_of_the_index_or_a_record_error(data: bytes) -> None:
    check_record(data)


class Pairs(list[tuple[str, Any]]):
    """A JSON object, in which a key may be repeated."""


KEYS = st.sampled_from(
    ["EXPECTED_QUANTITY", "BIN_FCSKU_DATA", "image_fname", "asin", "quantity", "height", "value"]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.sampled_from([1, 2, 2**31 - 1, 2**31, 10**400, 0.5, -0.0, 1e308, math.nan])
    | st.text(
        st.sampled_from('a0"\\/\0\n\x7f\xe9\u0663\u202e\ud800\udfff\ufeff\U0001f600'), max_size=5
    )
)


def pairs_of(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Pairs]:
    return st.builds(Pairs, st.lists(st.tuples(KEYS, values), max_size=5))


VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | pairs_of(inner), max_leaves=12
)


RECORDS_OF_JSON = st.builds(
    lambda quantities, *more: Pairs(
        [*(("EXPECTED_QUANTITY", quantity) for quantity in quantities), *chain(*more)]
    ),
    st.lists(st.sampled_from([1, 2]) | VALUES, max_size=2),
    (pairs_of(VALUES) | VALUES).map(lambda contents: [("BIN_FCSKU_DATA", contents)]),
    pairs_of(VALUES),
)


@cases(700)
@given(record=RECORDS_OF_JSON, ascii_only=st.booleans())
def test_any_json_is_a_row_of_the_index_or_a_record_error(record: Pairs, ascii_only: bool) -> None:
    check_record(as_json(record, ascii_only).encode("utf-8", "surrogatepass"))


def as_json(value: Any, ascii_only: bool) -> str:
    if isinstance(value, Pairs):
        pairs = [f"{json.dumps(key)}: {as_json(inner, ascii_only)}" for key, inner in value]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(as_json(inner, ascii_only) for inner in value) + "]"
    return json.dumps(value, ensure_ascii=ascii_only)


def check_record(data: bytes) -> None:
    row = result_or_refusal(lambda: row_of(data), RecordError)
    if not isinstance(row, RecordError):
        assert pa.Table.from_pylist([row], INDEX_SCHEMA).to_pylist() == [row]
        assert quantities(data) == {str(row["quantity"])}
    elif "EXPECTED_QUANTITY" in str(row):
        reason = "several different" if len(quantities(data)) > 1 else "no integer"
        assert str(row) == f"{reason} EXPECTED_QUANTITY"


def quantities(data: bytes) -> set[str]:
    """All values that a record gives as its quantity."""
    pairs = json.loads(data, object_pairs_hook=Pairs)
    values = [value for key, value in pairs if key == "EXPECTED_QUANTITY"]
    return {repr(tuple(value) if isinstance(value, Pairs) else value) for value in values}


@pytest.mark.parametrize(
    "piece", [b"[", b"[],", b"{},", b'{"":', b'"\\u0041",', b"1,", b"\xc3\xa9", b'"B1":{},']
)
@pytest.mark.parametrize("shape", [b"%s", b'{"EXPECTED_QUANTITY": 1, "BIN_FCSKU_DATA": {%s"": 1}}'])
def test_a_record_of_the_largest_size_is_read_or_refused_soon(piece: bytes, shape: bytes) -> None:
    data = shape % (piece * (MAX_RECORD_BYTES // len(piece)))
    result_or_refusal(lambda: parse_record(data), RecordError)
