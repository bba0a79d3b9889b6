from pathlib import Path
from typing import Any

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import fetch
from stages.collecting.bucket import open_bucket
from stages.collecting.listing import list_objects
from stages.collecting.reading import Reader
from stages.formats.shards import IMAGES, Reject, read_rejects, shard_paths, write_table
from stages.runtime import params
from stages.runtime.errors import UserError
from tests.conftest import (
    MakeBucket,
    bucket_params,
    folder_bucket,
    noted_reads,
    objects_of,
    write_params,
)
from tools.synthetic import SyntheticBin

RAW = Path("data/raw")
UNFETCHED = Path("data/unfetched.csv")


class StopError(Exception):
    """Raised to interrupt the work."""


def prepare(
    bucket: params.Bucket,
    synthetic: list[SyntheticBin],
    shard_bins: int = 1000,
    max_rejects: float = 0.0,
) -> None:
    """Write params.yaml, and a subset of all these bins as the bucket lists them."""
    photographs = list_objects(open_bucket(bucket), "bin-images/").drop_columns("stamp")
    listed = {Path(row["key"]).stem: row for row in photographs.to_pylist()}
    rows = [
        {"id": one.id, "quantity": one.quantity, "group": one.id, **listed[one.id]}
        for one in sorted(synthetic, key=lambda one: one.id)
    ]
    overrides = {"fetch.shard_bins": shard_bins, "fetch.max_rejects": max_rejects}
    write_params(bucket_params(bucket) | overrides)
    write_table(Path("data/subset.parquet"), pa.Table.from_pylist(rows))


def fetched() -> list[list[dict[str, Any]]]:
    return [pq.read_table(path).to_pylist() for path in shard_paths(RAW)]


def expected(synthetic: list[SyntheticBin]) -> list[dict[str, Any]]:
    return [
        {"id": one.id, "quantity": one.quantity, "image": one.photograph}
        for one in sorted(synthetic, key=lambda one: one.id)
    ]


@pytest.mark.usefixtures("workspace")
def test_shards_hold_the_photographs_byte_for_byte(
    make_bucket: MakeBucket, synthetic: list[SyntheticBin]
) -> None:
    prepare(make_bucket(objects_of(synthetic)), synthetic, shard_bins=50)
    fetch.main()
    shards = fetched()
    assert [len(shard) for shard in shards] == [50, 50, 21]
    assert sum(shards, []) == expected(synthetic)  # noqa: RUF017
    assert pq.read_schema(shard_paths(RAW)[0]).equals(IMAGES)
    assert read_rejects(UNFETCHED) == []


@pytest.mark.usefixtures("workspace")
def test_a_vanished_photograph_is_listed(
    make_bucket: MakeBucket, synthetic: list[SyntheticBin]
) -> None:
    bucket = make_bucket(objects_of(synthetic[:9]))
    prepare(bucket, synthetic[:9], max_rejects=0.2)
    obstore.delete(open_bucket(bucket), "bin-images/00004.jpg")
    fetch.main()
    assert read_rejects(UNFETCHED) == [Reject("00004", "not found")]
    assert fetched() == [expected([one for one in synthetic[:9] if one.id != "00004"])]


def test_too_many_vanished_photographs_stop_the_stage(
    workspace: Path, tmp_path: Path, synthetic: list[SyntheticBin]
) -> None:
    bucket = folder_bucket(tmp_path / "bucket", objects_of(synthetic[:9]))
    prepare(bucket, synthetic[:9], max_rejects=0.1)
    obstore.delete(open_bucket(bucket), ["bin-images/00004.jpg", "bin-images/00006.jpg"])
    with pytest.raises(UserError, match=r"fetch\.max_rejects .* 00004 \(not found\), 00006"):
        fetch.main()
    assert not (workspace / RAW).exists()
    assert not (workspace / UNFETCHED).exists()


@pytest.mark.usefixtures("workspace")
def test_the_next_run_resumes_where_one_failed(
    tmp_path: Path, synthetic: list[SyntheticBin], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = folder_bucket(tmp_path / "bucket", objects_of(synthetic[:40]))
    prepare(bucket, synthetic[:40], shard_bins=10)
    read = Reader.read

    async def read_until_stopped(reader: Reader, key: str, size: int, etag: str | None) -> bytes:
        if key == "bin-images/00025.jpg":
            raise StopError
        return await read(reader, key, size, etag)

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", read_until_stopped)
        patch.setattr(fetch, "SHARDS_AT_ONCE", 1)
        with pytest.raises(StopError):
            fetch.main()
    assert not RAW.exists()
    keys = noted_reads(monkeypatch)
    fetch.main()
    assert sorted(keys) == [f"bin-images/{number:05d}.jpg" for number in range(21, 41)]
    assert sum(fetched(), []) == expected(synthetic[:40])  # noqa: RUF017


@pytest.mark.usefixtures("workspace")
def test_a_photograph_that_changed_in_a_folder_since_a_failed_run_is_read_again(
    tmp_path: Path, synthetic: list[SyntheticBin], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = folder_bucket(tmp_path / "bucket", objects_of(synthetic[:20]))
    prepare(bucket, synthetic[:20], shard_bins=5)

    def stop(*_: object) -> None:
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "publish_folder", stop)
        with pytest.raises(StopError):
            fetch.main()
    # Of the same size.
    changed = synthetic[2]._replace(photograph=bytes(len(synthetic[2].photograph)))
    obstore.put(open_bucket(bucket), f"bin-images/{changed.id}.jpg", changed.photograph)
    fetch.main()
    assert sum(fetched(), []) == expected([*synthetic[:2], changed, *synthetic[3:20]])  # noqa: RUF017


@pytest.mark.usefixtures("workspace")
def test_the_next_run_resumes_even_if_an_unsampled_photograph_changed(
    tmp_path: Path, synthetic: list[SyntheticBin]
) -> None:
    bucket = folder_bucket(tmp_path / "bucket", objects_of(synthetic[:4]))
    prepare(bucket, synthetic[:3])
    store, subset = open_bucket(bucket), pq.read_table("data/subset.parquet")
    states = {fetch.folder_state(store, subset)}
    obstore.put(store, f"bin-images/{synthetic[3].id}.jpg", b"another")
    states.add(fetch.folder_state(store, subset))
    assert len(states) == 1


@pytest.mark.usefixtures("workspace")
def test_another_run_replaces_the_shards(tmp_path: Path, synthetic: list[SyntheticBin]) -> None:
    bucket = folder_bucket(tmp_path / "bucket", objects_of(synthetic[:20]))
    prepare(bucket, synthetic[:20], shard_bins=4)
    fetch.main()
    prepare(bucket, synthetic[:20], shard_bins=15)
    fetch.main()
    assert [len(shard) for shard in fetched()] == [15, 5]


def test_a_missing_folder_stops_the_stage(
    workspace: Path, tmp_path: Path, synthetic: list[SyntheticBin]
) -> None:
    bucket = folder_bucket(tmp_path / "bucket", objects_of(synthetic[:3]))
    prepare(bucket, synthetic[:3])
    (tmp_path / "bucket").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"bucket\.url: there is no folder"):
        fetch.main()
    assert not (workspace / RAW).exists()
