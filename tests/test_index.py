import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stages import index
from stages.collecting.reading import Reader
from stages.collecting.records import INDEX_SCHEMA, parse_record
from stages.runtime import params
from stages.runtime.errors import UserError
from tests.conftest import (
    MakeBucket,
    bucket_params,
    folder_bucket,
    noted_reads,
    objects_of,
    record_json,
    write_params,
)
from tools.synthetic import SyntheticBin

ITEM = {
    "asin": "B000000001",
    "name": None,
    "normalized_name": None,
    "quantity": 1,
    "height": None,
    "length": None,
    "width": None,
    "weight": None,
}


class StopError(Exception):
    """Raised to interrupt the work."""


def with_photographs(records: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"metadata/{bin_id}.json": data for bin_id, data in records.items()} | {
        f"bin-images/{bin_id}.jpg": b"a photograph" for bin_id in records
    }


def run_index(bucket: params.Bucket, max_rejects: float = 0.0) -> None:
    write_params(bucket_params(bucket) | {"index.max_rejects": max_rejects})
    index.main()


def indexed() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table("data/index.parquet").to_pylist()
    return rows


def counts() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(Path("data/index.json").read_text("utf-8"))
    return loaded


@pytest.mark.usefixtures("workspace")
def test_every_record_is_a_row_with_its_photograph(
    make_bucket: MakeBucket, synthetic: list[SyntheticBin]
) -> None:
    bucket = make_bucket(objects_of(synthetic))
    run_index(bucket)
    assert pq.read_schema("data/index.parquet").equals(INDEX_SCHEMA)
    rows = indexed()
    assert [row["id"] for row in rows] == sorted(synthetic_bin.id for synthetic_bin in synthetic)
    bins = {synthetic_bin.id: synthetic_bin for synthetic_bin in synthetic}
    for row in rows:
        synthetic_bin = bins[row["id"]]
        assert row["quantity"] == synthetic_bin.quantity
        assert row["items"] == parse_record(synthetic_bin.record)["items"]
        assert row["key"] == f"bin-images/{row['id']}.jpg"
        assert row["size"] == len(synthetic_bin.photograph)
        assert (row["etag"] is None) == (bucket.endpoint is None)
    assert counts() == {
        "records": 121,
        "indexed": 121,
        "left_out": {},
        "rejected": {},
        "examples": [],
    }


@pytest.mark.usefixtures("workspace")
def test_an_unpadded_twin_is_a_separate_bin(make_bucket: MakeBucket) -> None:
    twins = {
        "01102": record_json(10, ["B000000001"]),
        "1102": record_json(5, ["B000000002"], image_fname="1102.jpg"),
    }
    run_index(make_bucket(with_photographs(twins)))
    rows = indexed()
    assert [(row["id"], row["quantity"], row["image_fname"]) for row in rows] == [
        ("01102", 10, None),
        ("1102", 5, "1102.jpg"),
    ]
    assert rows[0]["items"] == [ITEM]


@pytest.mark.usefixtures("workspace")
def test_unusable_records_are_rejected_and_counted(make_bucket: MakeBucket) -> None:
    records = {f"{number:05d}": record_json(2) for number in range(1, 8)}
    records |= {"00003": b"{", "00004": b"<html>", "00005": record_json(2.5), "00006": b"[]"}
    run_index(make_bucket(with_photographs(records)), max_rejects=0.7)
    assert [row["id"] for row in indexed()] == ["00001", "00002", "00007"]
    assert counts() == {
        "records": 7,
        "indexed": 3,
        "left_out": {},
        "rejected": {
            "no integer EXPECTED_QUANTITY": 1,
            "not JSON": 2,
            "not JSON of a record": 1,
        },
        "examples": [
            {"id": "00003", "reason": "not JSON"},
            {"id": "00004", "reason": "not JSON"},
            {"id": "00005", "reason": "no integer EXPECTED_QUANTITY"},
            {"id": "00006", "reason": "not JSON of a record"},
        ],
    }


@pytest.mark.usefixtures("workspace")
def test_a_part_of_the_bucket_is_enough_and_what_is_left_out_is_counted(
    make_bucket: MakeBucket,
) -> None:
    records = {f"{number:05d}": record_json(2) for number in range(1, 31)}
    objects = with_photographs({"00007": record_json(2), "00012": record_json(3)})
    objects |= {f"metadata/{bin_id}.json": data for bin_id, data in records.items()} | {
        "bin-images/00099.jpg": b"a photograph without a record",
        "metadata/odd id.json": record_json(1),
        "metadata/._00007.json": b"what macOS keeps beside a file",
        "bin-images/._00007.jpg": b"what macOS keeps beside a file",
        "metadata/README.txt": b"not a record",
    }
    write_params(bucket_params(make_bucket(objects)) | {"index.max_rejects": 0.0})
    text = index.main()
    assert [row["id"] for row in indexed()] == ["00007", "00012"]
    left_out = {
        "records without a photograph": 28,
        "photographs without a record": 1,
        "files whose names are not ids": 3,
    }
    assert counts()["left_out"] == left_out
    assert "; left out: 28 records without a photograph, 1 photographs without a record," in text


@pytest.mark.usefixtures("workspace")
def test_endings_may_be_in_capitals_and_jpeg(make_bucket: MakeBucket) -> None:
    objects = {}
    for bin_id, record, photograph in [
        ("1", ".json", ".JPG"),
        ("2", ".JSON", ".jpeg"),
        ("3", ".json", ".JPEG"),
    ]:
        objects[f"metadata/{bin_id}{record}"] = record_json(2)
        objects[f"bin-images/{bin_id}{photograph}"] = b"a photograph"
    run_index(make_bucket(objects))
    assert [row["key"] for row in indexed()] == [
        "bin-images/1.JPG",
        "bin-images/2.jpeg",
        "bin-images/3.JPEG",
    ]


def test_two_photographs_of_a_bin_are_refused(workspace: Path, tmp_path: Path) -> None:
    objects = with_photographs({"1": record_json(2)}) | {"bin-images/1.JPG": b"another one"}
    with pytest.raises(UserError, match=r"the bin 1 has two files, .*JPG and .*jpg: keep one"):
        run_index(folder_bucket(tmp_path / "bucket", objects))
    assert not (workspace / "data").exists()


def test_too_many_unusable_records_stop_before_anything_is_written(
    workspace: Path, tmp_path: Path
) -> None:
    records = {f"{number:05d}": b"{" if number % 2 else record_json(1) for number in range(1, 31)}
    bucket = folder_bucket(tmp_path / "bucket", with_photographs(records))
    with pytest.raises(UserError, match=r"15 of 30 .* index\.max_rejects \(0\.1\)") as caught:
        run_index(bucket, max_rejects=0.1)
    assert [f"{n:05d}" in str(caught.value) for n in range(1, 22, 2)] == [True] * 10 + [False]
    assert not (workspace / "data").exists()


@pytest.mark.usefixtures("workspace")
def test_a_record_that_vanished_after_the_listing_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = {f"{number:05d}": record_json(1) for number in range(1, 5)}
    bucket = folder_bucket(tmp_path / "bucket", with_photographs(records))
    joined = index.join_listings

    def join_and_lose(*listings: Any) -> Any:
        (tmp_path / "bucket/metadata/00002.json").unlink()
        return joined(*listings)

    monkeypatch.setattr(index, "join_listings", join_and_lose)
    run_index(bucket, max_rejects=0.5)
    assert counts()["rejected"] == {"unreadable": 1}


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (["bin-images/00001.jpg"], r"has no metadata/<id>\.json: check bucket\.url"),
        (["metadata/00001.json"], r"has no bin-images/<id>\.jpg: check bucket\.url"),
        (["metadata/1.json", "bin-images/01.jpg"], "1 records and 1 photographs, but no bin has"),
    ],
)
def test_a_bucket_without_bins_is_named(
    workspace: Path, tmp_path: Path, keys: list[str], text: str
) -> None:
    bucket = folder_bucket(tmp_path / "bucket", dict.fromkeys(keys, b"{}"))
    with pytest.raises(UserError, match=text):
        run_index(bucket)
    assert not (workspace / "data").exists()


def test_finished_parts_of_a_killed_run_are_not_read_again(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = {f"{number:05d}": record_json(number % 6) for number in range(1, 21)}
    bucket = folder_bucket(tmp_path / "bucket", with_photographs(records))
    monkeypatch.setattr(index, "PART_RECORDS", 5)
    read = Reader.read

    async def read_until_stopped(reader: Reader, key: str, size: int, etag: str | None) -> bytes:
        if key == "metadata/00013.json":
            raise StopError
        return await read(reader, key, size, etag)

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", read_until_stopped)
        patch.setattr(index, "PARTS_AT_ONCE", 1)
        with pytest.raises(StopError):
            run_index(bucket)
    assert not (workspace / "data/index.parquet").exists()
    keys = noted_reads(monkeypatch)
    run_index(bucket)
    assert sorted(keys) == [f"metadata/{number:05d}.json" for number in range(11, 21)]
    assert [row["id"] for row in indexed()] == list(records)
    assert [row["quantity"] for row in indexed()] == [number % 6 for number in range(1, 21)]


@pytest.mark.parametrize("quantity", [12, 2], ids=["another size", "the same size"])
def test_parts_are_read_again_if_the_bucket_has_changed(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantity: int
) -> None:
    records = {f"{number:05d}": record_json(1) for number in range(1, 5)}
    bucket = folder_bucket(tmp_path / "bucket", with_photographs(records))

    def stop(*_: object) -> None:
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(index, "concatenate", stop)
        with pytest.raises(StopError):
            run_index(bucket)
    changed = tmp_path / "bucket/metadata/00002.json"
    changed.write_bytes(record_json(quantity))
    run_index(bucket)
    assert [row["quantity"] for row in indexed()] == [1, quantity, 1, 1]
    assert (workspace / "data/index.json").exists()


def test_a_damaged_part_of_a_killed_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(UserError, match=f"{tmp_path}/00000.parquet is damaged"):
        index.concatenate(tmp_path, tmp_path / "index.parquet")


@pytest.mark.usefixtures("workspace")
def test_the_index_has_the_same_bytes_on_every_machine(
    tmp_path: Path, synthetic: list[SyntheticBin]
) -> None:
    written = []
    for machine in ("one", "other"):
        run_index(folder_bucket(tmp_path / machine, objects_of(synthetic)))
        written.append(Path("data/index.parquet").read_bytes())
    assert written[0] == written[1]


@pytest.mark.usefixtures("workspace")
def test_the_real_bins_are_indexed(abid: Path) -> None:
    folder = abid / "originals-1k"
    bucket = params.Bucket(
        url=folder.resolve().as_uri(), region="us-east-1", endpoint=None, anonymous=True
    )
    run_index(bucket)
    assert (counts()["records"], counts()["indexed"]) == (1013, 1013)
    assert counts()["left_out"] == counts()["rejected"] == {}
    rows = indexed()
    assert sum(1 <= row["quantity"] <= 5 for row in rows) == 641
    assert sum(row["image_fname"] is not None for row in rows) == 14
    for row in rows[::50]:
        assert row["size"] == (folder / row["key"]).stat().st_size
