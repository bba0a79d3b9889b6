"""What audits read: counts and photographs, also such as nobody means well with."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from obstore.exceptions import GenericError, PermissionDeniedError

from stages.collecting.bucket import explained_at
from stages.collecting.records import parse_record
from stages.formats.shards import shard_name
from stages.runtime.errors import UserError
from tests.conftest import S3, record_json
from tests.made import bin_rows, square, write_resized, write_split
from tools.audit.expected import Expected, find_expected, left_out, read_counts
from tools.audit.objects import OPTIONS
from tools.audit.photographs import Photographs, open_photographs
from tools.audit.run import count_trained_on
from tools.audit.table import audit_table, spoken

SECRET = "AKIAIOSFODNN7EXAMPLE"  # noqa: S105 - of nobody: Amazon's example


def opened(place: str | Path) -> Any:
    return open_photographs(str(place), None, "us-east-1", signed=False)


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def counts_of(folder: Path, text: str | bytes) -> Expected:
    path = folder / "counts.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_counts(path)


def ids_of(photographs: Photographs) -> list[str]:
    return [content.id for content in photographs.read(0)]


@pytest.mark.parametrize(
    "text",
    [
        "id,expected\n00100,3\n100,4\n7,\n",
        'quantity,note,id\r\n3,"a, b",00100\r\n4,,100\r\n,,7\r\n',
        "\ufeffid,expected,quantity\n00100,3,9\n100, 4 ,9\n7,,9\n",
    ],
)
def test_counts_are_read_with_ids_as_texts(tmp_path: Path, text: str) -> None:
    counts = counts_of(tmp_path, text)

    assert counts.counts == {"00100": 3, "100": 4}
    assert counts.problems == {"7": "no expected count"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,expected\n00100,3\n100,4\n00100,5\n", "has the bin 00100 twice"),
        ("id,expected\n7,\n7,1\n", "has the bin 7 twice"),
        ("id,expected\n7,1\n8,three\n", "line 3: the count of 8 is 'three', not a whole number"),
        ("id,expected\n7,3.0\n", "the count of 7 is '3.0', not a whole number"),
        ("id,expected\n7,-1\n", "the count of 7 is '-1'"),
        ("id,expected\n7,\u0663\n", r"the count of 7 is '\\u0663'"),
        ("id,expected\n7,9999999999\n", "the count of 7 is '9999999999'"),
        ("id,expected\n../../etc/passwd,3\n", "line 2: '../../etc/passwd' is no bin's id"),
        ("id,expected\n=1+1,3\n", "line 2: '=1\\+1' is no bin's id"),
        ("id,expected\n<script>,3\n", "'<script>' is no bin's id"),
        ('id,expected\n"7\n",3\n', r"line 3: '7\\n' is no bin's id"),
        ("id,expected\n,3\n", "line 2: '' is no bin's id"),
        ("id;expected\n7;3\n", "first line is 'id;expected', and wants the columns id and expec"),
        ("bin,expected\n7,3\n", "wants the columns id"),
        ("", "first line is ''"),
        (b"id,expected\n\xff,3\n", "is not UTF-8"),
        ('id,expected\n7,"3\n', "no CSV: "),
    ],
)
def test_counts_that_are_not_as_they_have_to_be_are_refused(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        counts_of(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_long_id_is_cut_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        counts_of(tmp_path, f"id,expected\n{'x' * 10_000},3\n")
    assert len(str(caught.value)) < 300


def test_files_whose_names_are_no_ids_are_left_out(tmp_path: Path) -> None:
    odd = [
        "<script>alert(1)<.jpg",
        "=cmd|calc.jpg",
        "a b.jpg",
        "..jpg",
        ".x.jpg",
        f"{'x' * 65}.jpg",
    ]
    files = dict.fromkeys([*odd, "00100.jpg", "100.JPG", "-7.jpeg", "b.txt", "in/5.jpg"], b"x")
    photographs = opened(write_files(tmp_path / "photographs", files))
    records = write_files(tmp_path / "records", {"7.json": record_json(1), "a b.json": b"{}"})

    assert ids_of(photographs) == ["-7", "00100", "100"]
    found = list(left_out(photographs, find_expected(records, photographs)))
    assert sorted(found) == sorted([*odd, "a b.json"])


def test_two_files_of_one_bin_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are two files of the bin 100: keep one"):
        opened(write_files(tmp_path, {"100.jpg": b"x", "100.JPG": b"x", "00100.jpg": b"x"}))


def test_a_folder_in_the_bucket_layout_has_its_records_beside(tmp_path: Path) -> None:
    files = {
        "bin-images/00001.jpg": b"one",
        "bin-images/00002.jpg": b"two",
        "metadata/00001.json": record_json(3, ["A", "B"]),
        "metadata/00002.json": record_json("many"),
        "metadata/00003.json": b"nonsense",
        "thumbnails/00009.jpg": b"not asked for",
    }
    photographs = opened(write_files(tmp_path, files))

    expected = find_expected(None, photographs)

    assert [content.data for content in photographs.read(0)] == [b"one", b"two"]
    assert expected.counts == {"00001": 3}
    assert expected.problems == {
        "00002": "unusable record: no integer EXPECTED_QUANTITY",
        "00003": "unusable record: not JSON",
    }
    assert expected.records is not None
    items = expected.records.items(["00001", "00003", "00009"])
    assert items == {"00001": parse_record(files["metadata/00001.json"])["items"]}


def test_photographs_can_be_right_in_a_bucket(s3: S3) -> None:
    bucket = s3.make_bucket({"00001.jpg": b"one", "below/00002.jpg": b"two"})

    photographs = open_photographs(bucket.url, bucket.endpoint, bucket.region, signed=False)
    assert ids_of(photographs) == ["00001"]
    below = open_photographs(f"{bucket.url}/below", bucket.endpoint, bucket.region, signed=False)
    assert ids_of(below) == ["00002"]
    with pytest.raises(UserError, match="no counts come with the photographs"):
        find_expected(None, photographs)


def test_photographs_are_read_from_any_place_on(tmp_path: Path) -> None:
    rows = bin_rows([1, 2, 3] * 4)
    write_resized(tmp_path / "shards", rows, shard_bins=5)
    write_files(tmp_path / "files", {f"{row['id']}.jpg": row["image"] for row in rows})

    for place in ("shards", "files", "shards/00001.parquet"):
        photographs = opened(tmp_path / place)
        every = [(content.id, content.data) for content in photographs.read(0)]
        assert [bin_id for bin_id, _ in every] == photographs.ids
        assert set(every) <= {(row["id"], row["image"]) for row in rows}
        for start in range(len(every) + 1):
            found = [(content.id, content.data) for content in photographs.read(start)]
            assert found == every[start:]
        wanted = photographs.ids[1::2]
        assert [content.id for content in photographs.pick(wanted)] == wanted


def write_shard(folder: Path, **columns: Any) -> Path:
    path = folder / shard_name(0)
    pq.write_table(pa.table(columns), path)
    return path


def test_the_column_quantity_has_the_counts(tmp_path: Path) -> None:
    large = pa.array(["00001", "1"], pa.large_string()), pa.array([b"a", None], pa.large_binary())
    write_shard(tmp_path, image=large[1], id=large[0], quantity=pa.array([4, None], pa.uint8()))

    photographs = opened(tmp_path)

    assert find_expected(None, photographs).counts == {"00001": 4}
    assert [content.data for content in photographs.read(0)] == [b"a", b""]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["1"]}, "00000.parquet has no column image"),
        ({"image": [b"x"]}, "has no column id"),
        ({"id": [100], "image": [b"x"]}, "its column id has int64, not string"),
        ({"id": ["1"], "image": ["x"]}, "its column image has string, not binary"),
        ({"id": ["1"], "image": [b"x"], "quantity": [1.5]}, "quantity has double, not integers"),
        ({"id": ["1", "../x"], "image": [b"x"] * 2}, "row 2: '../x' is no bin's id"),
        ({"id": [None, "1"], "image": [b"x"] * 2}, "row 1: None is no bin's id"),
        ({"id": ["1", "1"], "image": [b"x"] * 2}, "two rows of the bin 1: keep one"),
        ({"id": pa.array([], pa.string()), "image": pa.array([], pa.binary())}, "no photographs"),
    ],
)
def test_shards_that_are_not_as_they_have_to_be_are_refused(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        opened(write_shard(tmp_path, **columns))


def test_shards_without_counts_want_a_csv(tmp_path: Path) -> None:
    photographs = opened(write_shard(tmp_path, id=["1"], image=[b"x"]))

    with pytest.raises(UserError, match=r"has no column quantity: give --expected counts\.csv"):
        find_expected(None, photographs)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    path = write_shard(tmp_path, id=["1"], image=[square(1, 1)])
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(UserError, match=r"00000\.parquet is damaged"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        (f"s3://{SECRET}:secret@bucket", None),
        (f"https://{SECRET}.example.com", None),
        ("s3://bucket", f"http://{SECRET}:secret@127.0.0.1"),
    ],
)
def test_a_malformed_url_is_not_repeated_since_it_may_hold_a_key(
    url: str, endpoint: str | None
) -> None:
    with pytest.raises(UserError, match="in a form like") as caught:
        open_photographs(url, endpoint, "us-east-1", signed=False)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("error", "signed", "message"),
    [
        (PermissionDeniedError(SECRET), False, "does not allow anonymous reads; add --signed"),
        (PermissionDeniedError(SECRET), True, "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        (GenericError(f"403 Forbidden: <E>{SECRET}</E>"), True, "refuses access"),
        (GenericError("404: <Code>NoSuchBucket</Code>"), True, "does not exist"),
        (
            GenericError(f"400 Bad Request: <Error><Token-0>{SECRET}</Token-0></Error>"),
            True,
            r"s3://bucket cannot be read: 400 Bad Request\. Check --endpoint",
        ),
    ],
)
def test_what_the_server_answers_is_not_repeated(
    error: Exception, message: str, *, signed: bool
) -> None:
    explained = explained_at("s3://bucket", OPTIONS, anonymous=not signed)
    with pytest.raises(UserError, match=message) as caught, explained:
        raise error
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([1, 2, 3], "1 to 3"),
        ([5, 0, 7], "0, 5, 7"),
        ([2, 1], "1 to 2"),
        ([3], "3 to 3"),
        ([0, 2**31 - 1], "0, 2147483647"),
    ],
)
def test_labels_are_spoken_as_people_do(labels: Sequence[int], text: str) -> None:
    assert spoken(labels) == text


def test_alarms_are_below_the_threshold_and_equal_scores_in_the_order_of_their_ids() -> None:
    ids = ["b", "100", "00100", "a", *(f"c{number}" for number in range(300))]
    scored = pd.DataFrame({"id": ids, "p1": 1e-20, "p2": 1.0, "problem": ""})
    # As suspicion all are 1.
    scored.loc[3, "p1"] = 1e-21
    expected = Expected("", counts=dict.fromkeys(ids, 1))

    table = audit_table(scored, expected, [1, 2], threshold=1e-20)

    assert table["id"].tolist() == ["a", *sorted(set(ids) - {"a"})]
    assert table["alarm"].tolist() == ["yes"] + ["no"] * 303


def test_bins_of_train_are_counted_with_ids_as_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert count_trained_on(["00100"]) == 0

    write_split(Path("data/split.csv"), {"00100": "train", "7": "train", "00007": "test"})

    assert count_trained_on(["00100", "100", "00007", "8"]) == 1


def test_counts_beyond_what_records_can_have_are_refused_at_once(tmp_path: Path) -> None:
    columns = {"id": ["00001"], "image": [b"one"], "quantity": pa.array([2**63], pa.uint64())}
    pq.write_table(pa.table(columns), tmp_path / shard_name(0))

    with pytest.raises(UserError, match="its column quantity has a number above 2147483647"):
        opened(tmp_path)


def test_no_cell_can_be_a_formula_that_does_something(tmp_path: Path) -> None:
    """An id may begin with a minus, but has no parenthesis, quote, pipe or exclamation mark."""
    for text in ("-1+cmd|' /C calc'!A0", "-HYPERLINK(1)", "+1", "@SUM(A1)", "=1", "\t=1"):
        cell = io.StringIO()
        csv.writer(cell).writerow([text, "3"])
        with pytest.raises(UserError, match="is no bin's id"):
            counts_of(tmp_path, f"id,expected\n{cell.getvalue()}")
    assert counts_of(tmp_path, "id,expected\n-1,3\n").counts == {"-1": 3}
