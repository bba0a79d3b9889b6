"""The inventory record of a bin (metadata/<id>.json), parsed."""

import json
import re
from itertools import accumulate
from typing import Any, TypedDict

import orjson
import pyarrow as pa

_MEASURE = pa.struct([("unit", pa.string()), ("value", pa.float64())])
_ITEM = pa.struct(
    [
        ("asin", pa.string()),
        ("name", pa.string()),
        ("normalized_name", pa.string()),
        ("quantity", pa.int32()),
        ("height", _MEASURE),
        ("length", _MEASURE),
        ("width", _MEASURE),
        ("weight", _MEASURE),
    ]
)
#: A row of data/index.parquet: the record, then the photograph's object as it was listed.
INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("quantity", pa.int32()),
        ("items", pa.list_(_ITEM)),
        ("image_fname", pa.string()),
        ("key", pa.string()),
        ("size", pa.int64()),
        ("etag", pa.string()),
    ]
)
#: Larger records are not read, since hundreds are in memory at once. The largest of 11,000 real
#: records has 10 kB.
MAX_RECORD_BYTES = 4 * 1024 * 1024
_INT32_MAX = 2**31 - 1
_QUANTITY = "EXPECTED_QUANTITY"
_CONTENTS = "BIN_FCSKU_DATA"
# Another way to spell a capital letter or _ in JSON.
_ESCAPED_CAPITAL = re.compile(rb"\\u00[45]")
_ESCAPED = re.compile(rb"\\.")
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
# Real records have 4.
_MOST_LEVELS = 100


class Record(TypedDict):
    """What a record holds. `quantity` is EXPECTED_QUANTITY, the count that the system believes."""

    quantity: int
    items: list[dict[str, Any]]
    image_fname: str | None


class RecordError(ValueError):
    """The record cannot be used; the text is one of a few reasons."""


def parse_record(data: bytes) -> Record:
    """Parse a record's JSON. Raises RecordError if it has no usable quantity.

    A missing or ill-typed detail of an item becomes null, because the count does not depend on it.
    """
    try:
        record = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise RecordError("not JSON") from None
    if not isinstance(record, dict):
        raise RecordError("not JSON of a record")
    if _may_repeat_a_key(data):
        _refuse_repeated_keys(data)
    quantity = _integer(record.get(_QUANTITY))
    if quantity is None:
        raise RecordError(f"no integer {_QUANTITY}")
    contents = record.get(_CONTENTS)
    items = contents if isinstance(contents, dict) else {}
    return Record(
        quantity=quantity,
        items=[_item(asin, item) for asin, item in items.items() if isinstance(item, dict)],
        image_fname=_text(record.get("image_fname")),
    )


def _may_repeat_a_key(data: bytes) -> bool:
    """A quick check, false for every real record: 2 of the 16 microseconds of parsing one."""
    return (
        data.count(b'"EXPECTED_QUANTITY"') > 1
        or data.count(b'"BIN_FCSKU_DATA"') > 1
        or (b"\\" in data and _ESCAPED_CAPITAL.search(data) is not None)
    )


def _refuse_repeated_keys(data: bytes) -> None:
    """Raise RecordError if a key has several values, of which orjson silently keeps the last."""
    # How deeply json reads depends on the Python process, which must not decide about a record.
    if _levels(data) > _MOST_LEVELS:
        raise RecordError("nested too deeply")
    pairs: tuple[tuple[str, Any], ...] = json.loads(data, object_pairs_hook=tuple)
    for key in (_QUANTITY, _CONTENTS):
        if len({repr(value) for name, value in pairs if name == key}) > 1:
            raise RecordError(f"several different {key}")


def _levels(data: bytes) -> int:
    """How deeply the JSON of an object is nested."""
    no_strings = b"".join(_ESCAPED.sub(b"", data).split(b'"')[::2])
    return max(accumulate(_STEPS.get(byte, 0) for byte in no_strings))


def _item(asin: str, item: dict[str, Any]) -> dict[str, Any]:
    return {
        "asin": _text(item.get("asin")) or asin,
        "name": _text(item.get("name")),
        "normalized_name": _text(item.get("normalizedName")),
        "quantity": _integer(item.get("quantity")),
        "height": _measure(item.get("height")),
        "length": _measure(item.get("length")),
        "width": _measure(item.get("width")),
        "weight": _measure(item.get("weight")),
    }


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _integer(value: Any) -> int | None:
    """A count: an integer that the index's column can hold, from 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value <= _INT32_MAX else None


def _measure(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    number = value.get("value")
    if isinstance(number, bool) or not isinstance(number, int | float):
        number = None
    return {"unit": _text(value.get("unit")), "value": None if number is None else float(number)}
