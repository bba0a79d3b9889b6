"""The counts and photographs that audits read, including hostile ones, and the resulting table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.collecting.records import parse_record
from stages.formats.shards import shard_name
from stages.runtime.errors import UserError
from tests.builders import bin_rows, square, write_resized
from tests.conftest import record_json
from tools.audit.expected import Expected, find_expected
from tools.audit.photographs import Photographs, open_photographs
from tools.audit.table import audit_table, describe_labels

SECRET = "AKIAIOSFODNN7EXAMPLE"  # noqa: S105 - Amazon's example


def write_files(folder: Path, files: Mapping[str, bytes]) -> str:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def contents_of(photographs: Photographs, start: int = 0, size: int = 3) -> list[tuple[str, bytes]]:
    parts = list(photographs.parts(start, size))
    assert all(len(part) == size for part in parts[:-1])
    return [(content.id, content.data) for part in parts for content in part]


def test_files_whose_names_are_not_ids_are_left_out(tmp_path: Path) -> None:
    odd = ["<script>alert(1)<.jpg", "=cmd|calc.jpg", "a b.jpg", "..jpg", f"{'x' * 65}.jpg"]
    files = dict.fromkeys([*odd, "00100.jpg", "100.JPG", "-7.jpeg", "b.txt", "in/5.jpg"], b"x")
    photographs = open_photographs(write_files(tmp_path / "photographs", files))
    records = tmp_path / "records"
    write_files(records, {"7.json": record_json(1), "a b.json": b"{}"})

    assert photographs.ids == ["-7", "00100", "100"]
    assert sorted(photographs.left_out) == sorted(odd)
    assert find_expected(records, photographs).left_out == ["a b.json"]


def test_a_folder_in_the_bucket_layout_has_its_records_beside_the_photographs(
    tmp_path: Path,
) -> None:
    files = {
        "bin-images/00001.jpg": b"one",
        "bin-images/00002.jpg": b"two",
        "metadata/00001.json": record_json(3, ["A", "B"]),
        "metadata/00002.json": record_json("many"),
        "metadata/00003.json": b"nonsense",
        "thumbnails/00009.jpg": b"not asked for",
    }
    photographs = open_photographs(write_files(tmp_path, files))

    expected = find_expected(None, photographs)

    assert contents_of(photographs) == [("00001", b"one"), ("00002", b"two")]
    assert expected.counts == {"00001": 3}
    assert expected.problems == {
        "00002": "unusable record: no integer EXPECTED_QUANTITY",
        "00003": "unusable record: not JSON",
    }
    items = expected.items(["00001", "00003", "00009"])
    assert items == {"00001": parse_record(files["metadata/00001.json"])["items"]}


@pytest.mark.parametrize("source", ["shards", "files", "shards/00001.parquet"])
def test_photographs_are_read_from_any_position_on(tmp_path: Path, source: str) -> None:
    rows = bin_rows([1, 2, 3] * 4)
    write_resized(tmp_path / "shards", rows, shard_bins=5)
    write_files(tmp_path / "files", {f"{row['id']}.jpg": row["image"] for row in rows})

    photographs = open_photographs(str(tmp_path / source))

    every = contents_of(photographs)
    assert [bin_id for bin_id, _ in every] == photographs.ids
    assert set(every) <= {(row["id"], row["image"]) for row in rows}
    for start in range(len(every) + 1):
        assert contents_of(photographs, start) == every[start:]
    wanted = photographs.ids[1::2]
    assert [content.id for content in photographs.pick(wanted)] == wanted


def test_a_vanished_photograph_has_a_problem(tmp_path: Path) -> None:
    photographs = open_photographs(write_files(tmp_path, {"1.jpg": b"one", "2.jpg": b"two"}))
    (tmp_path / "1.jpg").unlink()

    (part,) = photographs.parts(0, 2)

    assert [(content.id, content.data, content.problem) for content in part] == [
        ("1", b"", "not found"),
        ("2", b"two", ""),
    ]


def write_shard(folder: Path, **columns: Any) -> str:
    path = folder / shard_name(0)
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_the_column_quantity_has_the_counts(tmp_path: Path) -> None:
    ids = pa.array(["00001", "1"], pa.large_string())
    images = pa.array([b"a", None], pa.large_binary())
    source = write_shard(tmp_path, image=images, id=ids, quantity=pa.array([4, None], pa.uint8()))

    photographs = open_photographs(source)

    assert find_expected(None, photographs).counts == {"00001": 4}
    assert contents_of(photographs) == [("00001", b"a"), ("1", b"")]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["1"]}, "the column image is missing; it should be binary"),
        ({"image": [b"x"]}, "the column id is missing; it should be string"),
        ({"id": [100], "image": [b"x"]}, "the column id is int64; it should be string"),
        ({"id": ["1"], "image": ["x"]}, "the column image is string; it should be binary"),
        (
            {"id": ["1"], "image": [b"x"], "quantity": [1.5]},
            "quantity is double; it should be integer",
        ),
        ({"id": ["1", "../x"], "image": [b"x"] * 2}, "row 2: '../x' is not a bin's id"),
        ({"id": [None, "1"], "image": [b"x"] * 2}, "row 1: None is not a bin's id"),
        ({"id": ["1", "1"], "image": [b"x"] * 2}, "two rows of the bin 1: keep one"),
        ({"id": pa.array([], pa.string()), "image": pa.array([], pa.binary())}, "no photographs"),
    ],
)
def test_shards_that_cannot_be_used_are_refused(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_photographs(write_shard(tmp_path, **columns))
    assert "00000.parquet" in str(caught.value) or "two rows" in message


def test_two_files_of_one_bin_are_refused(tmp_path: Path) -> None:
    source = write_files(tmp_path, {"100.jpg": b"x", "100.JPG": b"x", "00100.jpg": b"x"})

    with pytest.raises(UserError, match=r"the bin 100 has two files, .*JPG and .*jpg: keep one"):
        open_photographs(source)


def test_shards_without_counts_need_a_csv(tmp_path: Path) -> None:
    photographs = open_photographs(write_shard(tmp_path, id=["1"], image=[b"x"]))

    with pytest.raises(UserError, match=r"has no column quantity: add --expected counts\.csv"):
        find_expected(None, photographs)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    path = Path(write_shard(tmp_path, id=["1"], image=[square(1, 1)]))
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(UserError, match=r"00000\.parquet is damaged"):
        open_photographs(str(tmp_path))


@pytest.mark.parametrize(
    ("url", "endpoint", "message"),
    [
        (f"s3://{SECRET}:secret@bucket", None, "the url should look like s3://bucket/prefix"),
        (f"https://{SECRET}.example.com", None, "the url should look like s3://bucket/prefix"),
        ("s3://bucket", f"http://{SECRET}:secret@127.0.0.1", "the endpoint should look like http:"),
    ],
)
def test_a_malformed_url_is_not_repeated_since_it_may_hold_a_key(
    url: str, endpoint: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_photographs(url, endpoint)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("labels", "text"),
    [([1, 2, 3], "1 to 3"), ([5, 0, 7], "0, 5, 7"), ([2, 1], "1 to 2"), ([3], "3 to 3")],
)
def test_labels_are_described_as_people_would(labels: Sequence[int], text: str) -> None:
    assert describe_labels(labels) == text


def test_alarms_are_below_the_threshold_and_equal_scores_in_the_order_of_their_ids() -> None:
    ids = ["b", "100", "00100", "a", *(f"c{number}" for number in range(300))]
    scored = pd.DataFrame({"id": ids, "p1": 1e-20, "p2": 1.0, "problem": ""})
    # Rounding makes every suspicion 1.
    scored.loc[3, "p1"] = 1e-21
    expected = Expected("", counts=dict.fromkeys(ids, 1))

    table = audit_table(scored, expected, [1, 2], np.array([1e-20, 1e-20]))

    assert table["id"].tolist() == ["a", *sorted(set(ids) - {"a"})]
    assert table["alarm"].tolist() == ["yes"] + ["no"] * 303


@pytest.mark.parametrize("source", ["shards", "files"])
def test_photographs_that_are_dropped_are_neither_listed_nor_read(
    tmp_path: Path, source: str
) -> None:
    rows = bin_rows([1, 2, 3] * 4)
    write_resized(tmp_path / "shards", rows, shard_bins=5)
    write_files(tmp_path / "files", {f"{row['id']}.jpg": row["image"] for row in rows})
    photographs = open_photographs(str(tmp_path / source))
    identity = photographs.identity
    kept = [row for row in rows if row["id"] in ("00001", "00003", "00012")]

    photographs.drop({row["id"] for row in rows if row not in kept})

    assert photographs.ids == ["00001", "00003", "00012"]
    assert photographs.identity != identity
    contents = [(row["id"], row["image"]) for row in kept]
    for start in range(4):
        assert contents_of(photographs, start, size=2) == contents[start:]
    assert [content.id for content in photographs.pick(["00003", "00012"])] == ["00003", "00012"]
