import json
import sys
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from stages.collecting.ids import is_bin_id
from stages.collecting.records import (
    INDEX_SCHEMA,
    MAX_RECORD_BYTES,
    RecordError,
    parse_record,
)

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
    """A real record with one item, some of whose details are changed."""
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


@pytest.mark.parametrize(
    "value", ["1e308", "18446744073709551615", "18446744073709551616", "-1e-320", "0.1e-400"]
)
def test_a_measure_of_any_size_is_a_float(value: str) -> None:
    data = record_of(height={"unit": "IN", "value": 4.5}).replace(b"4.5", value.encode())
    row = row_of(data)
    assert row["items"][0]["height"]["value"] == float(value)
    assert pa.Table.from_pylist([row], INDEX_SCHEMA).to_pylist() == [row]


@pytest.mark.parametrize("contents", [None, [], "B1", 3, {"B1": None, "B2": "two"}])
def test_contents_of_another_shape_have_no_items(contents: Any) -> None:
    data = json.dumps({"BIN_FCSKU_DATA": contents, "EXPECTED_QUANTITY": 1}).encode()
    assert parse_record(data) == {"quantity": 1, "items": [], "image_fname": None}


@pytest.mark.parametrize(
    "quantity",
    [
        *("null", "3.0", "true", "-1", '"3"', "[3]", "{}", "1e2", "1e308", "-0.0", "-1e-400"),
        *("2147483648", "-2147483649", "9223372036854775808", "99999999999999999999"),
    ],
)
def test_a_quantity_that_is_not_a_count_is_refused(quantity: str) -> None:
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
        b'{"EXPECTED_QUANTITY": 1e400}',
        b'{"EXPECTED_QUANTITY": 1' + b"0" * 400 + b"}",
        b'{"EXPECTED_QUANTITY": 1' + b"0" * 5000 + b"}",
        b'{"EXPECTED_QUANTITY": 01}',
        b'{"EXPECTED_QUANTITY": +1}',
        b'{"EXPECTED_QUANTITY": 0x1}',
        b'{"EXPECTED_QUANTITY": 1,}',
        b"{'EXPECTED_QUANTITY': 1}",
        '{"EXPECTED_QUANTITY": \u0663}'.encode(),
        '{"EXPECTED_QUANTITY": 1}'.encode("utf-8-sig"),
        '{"EXPECTED_QUANTITY": 1}'.encode("utf-16"),
        '{"EXPECTED_QUANTITY": 1}'.encode("utf-32-le"),
        b'{"EXPECTED_QUANTITY": 1, "image_fname": "\\ud800"}',
        b'{"EXPECTED_QUANTITY": 1, "image_fname": "\xed\xa0\x80"}',
        b'{"EXPECTED_QUANTITY": 1, "image_fname": "\0"}',
        b'{"EXPECTED_QUANTITY": 1}\0',
        b'{"EXPECTED_QUANTITY": 1} {}',
        b'{"EXPECTED_QUANTITY": 1, "image_fname": "\xff\xfe"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[]",
        b"3",
        b"null",
    ],
    ids=lambda data: repr(data[:40]),
)
def test_data_that_is_not_a_json_record_is_refused(data: bytes) -> None:
    with pytest.raises(RecordError, match="not JSON"):
        parse_record(data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"EXPECTED_QUANTITY": 1, "EXPECTED_QUANTITY": 2}',
        b'{"EXPECTED_QUANTITY": 2, "a": {}, "EXPECTED_QUANTITY": null}',
        b'{"EXPECTED_QUANTITY": "2", "EXPECTED_QUANTITY": 2}',
        b'{"EXPECTED_QUANTITY": 2.0, "EXPECTED_QUANTITY": 2}',
        b'{"EXPECTED_QUANTITY": true, "EXPECTED_QUANTITY": 1}',
        b'{"EXPECTED_QUANTITY": 1, "EXPECTED_\\u0051UANTITY": 2}',
        b'{"EXPECTED\\u005fQUANTITY": 1, "EXPECTED_QUANTITY": 2}',
        b'{"EXPECTED\\u005FQUANTITY": 1, "\\u0045XPECTED_QUANTITY": 2}',
        b'{"EXPECTED_QUANTITY"\n:1,"EXPECTED_QUANTITY"\t:2, "EXPECTED_QUANTITY": 1}',
    ],
    ids=repr,
)
def test_a_record_with_two_quantities_is_refused(data: bytes) -> None:
    with pytest.raises(RecordError, match=r"^several different EXPECTED_QUANTITY$"):
        parse_record(data)


def test_a_record_with_two_contents_is_refused() -> None:
    data = b'{"BIN_FCSKU_DATA": {"B1": {}}, "EXPECTED_QUANTITY": 1, "BIN_FCSKU_DATA": {"B2": {}}}'
    with pytest.raises(RecordError, match=r"^several different BIN_FCSKU_DATA$"):
        parse_record(data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"EXPECTED_QUANTITY": 3, "EXPECTED_QUANTITY": 3}',
        b'{"EXPECTED_QUANTITY": 3, "x": {"EXPECTED_QUANTITY": 4}}',
        b'{"x": [{"EXPECTED_QUANTITY": 4}, "EXPECTED_QUANTITY"], "EXPECTED_QUANTITY": 3}',
        b'{"EXPECTED_QUANTITY": 3, "EXPECTED_QUANTITY ": 4, "expected_quantity": 5}',
        b'{"EXPECTED_\\u0051UANTITY": 3}',
        b'{"BIN_FCSKU_DATA": {}, "EXPECTED_QUANTITY": 3, "BIN_FCSKU_DATA": {}}',
        b'{"EXPECTED_QUANTITY": 3, "x": "\\"EXPECTED_QUANTITY\\": 4"}',
    ],
    ids=repr,
)
def test_records_that_only_seem_to_have_two_quantities_are_read(data: bytes) -> None:
    assert parse_record(data)["quantity"] == 3


@pytest.fixture(params=[1_000, 100_000])
def recursion_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """Python's default, and a higher one, as torch's compiler sets it permanently."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(request.param)
    yield
    sys.setrecursionlimit(before)


def deep_record(levels: int, more: str = "") -> bytes:
    """A record with this many nested levels, including itself. Brackets in strings do not count."""
    arrays = "[" * (levels - 1) + "]" * (levels - 1)
    return f'{{"EXPECTED_QUANTITY": 1, "x": {arrays}, "y": "\\"{"[" * 200}"{more}}}'.encode()


@pytest.mark.usefixtures("recursion_limit")
def test_a_repeated_quantity_in_a_deep_record_does_not_crash() -> None:
    again = ', "EXPECTED_QUANTITY": 1'
    assert parse_record(deep_record(1000))["quantity"] == 1
    assert parse_record(deep_record(100, again))["quantity"] == 1
    for levels in (101, 1000):
        with pytest.raises(RecordError, match=r"^nested too deeply$"):
            parse_record(deep_record(levels, again))


def test_names_may_hold_any_character() -> None:
    name = "\0\x1f\x7f\u2028\ufeff\U0001f600 ../..\\ \"'"
    row = row_of(record_of(name=name))
    assert row["items"][0]["name"] == name
    assert pa.Table.from_pylist([row], INDEX_SCHEMA).to_pylist() == [row]


def row_of(data: bytes) -> dict[str, Any]:
    return {"id": "00001", **parse_record(data), "key": "k", "size": 1, "etag": None}


@pytest.mark.parametrize("data", [record_of(), record_of(weight=None, name=None, asin=None)])
def test_a_record_fits_the_index(data: bytes) -> None:
    assert pa.Table.from_pylist([row_of(data)], INDEX_SCHEMA).to_pylist() == [row_of(data)]


@pytest.mark.parametrize("text", ["00001", "535234", "1", "1200", "bin_7-a"])
def test_ids_of_the_bucket_are_bin_ids(text: str) -> None:
    assert is_bin_id(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "a/b", "..", "../1", "1/../2", "1.jpg", " 1", "1 ", "1\n", "1\0", "\u202e1"),
        *("\u0663", "\uff11", "1\u0301", "1%2F", "1\\2", "x" * 65),
    ],
    ids=ascii,
)
def test_text_that_is_unsafe_in_a_file_name_is_not_a_bin_id(text: str) -> None:
    assert not is_bin_id(text)


def test_twins_with_the_same_number_stay_different_ids() -> None:
    twins = ["1", "01", "00001", "000001", "-1"]
    assert all(map(is_bin_id, twins))
    rows = [row_of(record_of()) | {"id": twin} for twin in twins]
    assert pa.Table.from_pylist(rows, INDEX_SCHEMA)["id"].to_pylist() == twins


def test_every_real_record_is_far_below_the_limit(abid_records: dict[str, bytes]) -> None:
    assert max(map(len, abid_records.values())) < MAX_RECORD_BYTES / 100


def test_every_real_record_parses_with_its_quantity(abid_records: dict[str, bytes]) -> None:
    for bin_id, data in abid_records.items():
        original = json.loads(data)
        record = parse_record(data)
        assert record["quantity"] == original["EXPECTED_QUANTITY"], bin_id
        asins = [item["asin"] for item in record["items"]]
        assert asins == list(original["BIN_FCSKU_DATA"]), bin_id
        assert record["image_fname"] == original.get("image_fname"), bin_id
