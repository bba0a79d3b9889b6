import json
from typing import Any

import pyarrow as pa
import pytest

from stages.core.records import INDEX, RecordError, is_bin_id, parse_record

REAL_ITEM = {
    "asin": "B000A8C5QE",
    "height": {"unit": "IN", "value": 4.2},
    "length": {"unit": "IN", "value": 4.7},
    "name": "MSR PocketRocket Stove",
    "normalizedName": "MSR PocketRocket Stove",
    "quantity": 2,
    "weight": {"unit": "pounds", "value": 0.45},
    "width": {"unit": "IN", "value": 4.4},
}


def record_of(**changes: Any) -> bytes:
    """A real record of one item, with some of the item's details changed."""
    contents = {"B000A8C5QE": REAL_ITEM | changes}
    return json.dumps({"BIN_FCSKU_DATA": contents, "EXPECTED_QUANTITY": 2}).encode()


def test_a_record_is_read_whole() -> None:
    assert parse_record(record_of()) == {
        "quantity": 2,
        "items": [
            {
                "asin": "B000A8C5QE",
                "name": "MSR PocketRocket Stove",
                "normalized_name": "MSR PocketRocket Stove",
                "quantity": 2,
                "height": {"unit": "IN", "value": 4.2},
                "length": {"unit": "IN", "value": 4.7},
                "width": {"unit": "IN", "value": 4.4},
                "weight": {"unit": "pounds", "value": 0.45},
            }
        ],
        "image_fname": None,
    }


def test_an_empty_bin_has_no_items() -> None:
    record = parse_record(b'{"BIN_FCSKU_DATA": {}, "EXPECTED_QUANTITY": 0}')
    assert record == {"quantity": 0, "items": [], "image_fname": None}


def test_an_unpadded_record_keeps_its_image_fname() -> None:
    data = b'{"BIN_FCSKU_DATA": {}, "EXPECTED_QUANTITY": 5, "image_fname": "1102.jpg"}'
    assert parse_record(data)["image_fname"] == "1102.jpg"


def test_the_expected_quantity_counts_not_the_sum_of_the_items() -> None:
    assert parse_record(record_of(quantity=7))["quantity"] == 2


@pytest.mark.parametrize(
    ("detail", "value", "parsed"),
    [
        ("weight", None, None),
        ("weight", "heavy", None),
        ("weight", 3, None),
        ("height", {"unit": "IN", "value": None}, {"unit": "IN", "value": None}),
        ("height", {"unit": "IN", "value": "4"}, {"unit": "IN", "value": None}),
        ("height", {"unit": 1, "value": True}, {"unit": None, "value": None}),
        ("height", {"unit": "IN", "value": 4}, {"unit": "IN", "value": 4.0}),
        ("length", {}, {"unit": None, "value": None}),
        ("name", None, None),
        ("name", ["a"], None),
        ("quantity", "2", None),
        ("quantity", 2.0, None),
        ("quantity", True, None),
        ("quantity", -1, None),
        ("quantity", 2**31, None),
        ("asin", None, "B000A8C5QE"),
        ("asin", 7, "B000A8C5QE"),
    ],
)
def test_an_ill_typed_detail_is_null(detail: str, value: Any, parsed: Any) -> None:
    record = parse_record(record_of(**{detail: value}))
    assert record["items"][0][detail] == parsed


def test_missing_details_are_null() -> None:
    record = parse_record(b'{"BIN_FCSKU_DATA": {"B1": {}}, "EXPECTED_QUANTITY": 1}')
    asin, *details = record["items"][0].values()
    assert asin == "B1"
    assert details == [None] * 7


@pytest.mark.parametrize("contents", [None, [], "B1", 3, {"B1": None, "B2": "two"}])
def test_contents_of_another_shape_are_no_items(contents: Any) -> None:
    data = json.dumps({"BIN_FCSKU_DATA": contents, "EXPECTED_QUANTITY": 1}).encode()
    assert parse_record(data) == {"quantity": 1, "items": [], "image_fname": None}


@pytest.mark.parametrize(
    "quantity",
    ["null", "3.0", "true", "-1", '"3"', "[3]", "2147483648", "99999999999999999999", "1e2"],
)
def test_a_quantity_that_is_no_count_is_refused(quantity: str) -> None:
    data = f'{{"BIN_FCSKU_DATA": {{}}, "EXPECTED_QUANTITY": {quantity}}}'
    with pytest.raises(RecordError, match="no integer EXPECTED_QUANTITY"):
        parse_record(data.encode())


def test_a_missing_quantity_is_refused() -> None:
    with pytest.raises(RecordError, match="no integer EXPECTED_QUANTITY"):
        parse_record(b'{"BIN_FCSKU_DATA": {}}')


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html></html>",
        b'{"BIN_FCSKU_DATA": {}, "EXPECTED_QUANT',
        b'{"EXPECTED_QUANTITY": NaN}',
        b'{"EXPECTED_QUANTITY": 1, "BIN_FCSKU_DATA": Infinity}',
        b'{"EXPECTED_QUANTITY": 1} {}',
        b'{"EXPECTED_QUANTITY": 1, "image_fname": "\xff\xfe"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[]",
        b"3",
        b"null",
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_not_json_of_a_record_is_refused(data: bytes) -> None:
    with pytest.raises(RecordError, match="not JSON"):
        parse_record(data)


@pytest.mark.parametrize("data", [record_of(), record_of(weight=None, name=None, asin=None)])
def test_a_record_fits_the_index(data: bytes) -> None:
    row = {"id": "00001", **parse_record(data), "key": "k", "size": 1, "etag": None}
    assert pa.Table.from_pylist([row], INDEX).to_pylist() == [row]


@pytest.mark.parametrize("text", ["00001", "535234", "1", "1200", "bin_7-a"])
def test_ids_of_the_bucket_are_bin_ids(text: str) -> None:
    assert is_bin_id(text)


@pytest.mark.parametrize("text", ["", "a/b", "..", "1.jpg", " 1", "1\n", "٣", "x" * 65])
def test_what_is_unsafe_in_a_file_name_is_no_bin_id(text: str) -> None:
    assert not is_bin_id(text)


def test_every_real_record_parses_with_its_quantity(abid_records: dict[str, bytes]) -> None:
    for bin_id, data in abid_records.items():
        original = json.loads(data)
        record = parse_record(data)
        assert record["quantity"] == original["EXPECTED_QUANTITY"], bin_id
        asins = [item["asin"] for item in record["items"]]
        assert asins == list(original["BIN_FCSKU_DATA"]), bin_id
        assert record["image_fname"] == original.get("image_fname"), bin_id
