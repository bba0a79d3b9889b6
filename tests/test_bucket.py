import asyncio
import hashlib
from collections.abc import Iterable
from itertools import repeat
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import GenericError
from obstore.store import S3Store

from stages.collecting import reading
from stages.collecting.advice import explained
from stages.collecting.bucket import Store, open_bucket
from stages.collecting.failures import ObjectError
from stages.collecting.listing import list_objects
from stages.collecting.reading import Reader
from stages.runtime import params
from stages.runtime.errors import UserError
from tests.conftest import S3, MakeBucket, folder_bucket
from tools.s3 import free_port

KEY = "metadata/00001.json"
CONTENT = b'{"EXPECTED_QUANTITY": 3}'
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()


@pytest.fixture
def short_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait half a minute for a server to come back."""
    monkeypatch.setattr(reading, "DEADLINE", 0.5)


def read(store: Store, key: str, size: int, etag: str | None) -> bytes:
    return asyncio.run(Reader(store).read(key, size, etag))


def listed(source: params.Bucket, prefix: str) -> list[dict[str, Any]]:
    with explained(source):
        rows: list[dict[str, Any]] = list_objects(open_bucket(source), prefix).to_pylist()
    return rows


@pytest.mark.parametrize("count", [0, 1, 1000, 1001])
def test_listings_around_one_page_are_complete(s3: S3, count: int) -> None:
    keys = [f"metadata/{number:05d}.json" for number in range(count)]
    source = s3.make_bucket(dict.fromkeys(keys, b"{}"))
    assert [row["key"] for row in listed(source, "metadata/")] == keys


def test_a_listing_in_ranges_has_every_key_once(make_bucket: MakeBucket) -> None:
    ids = [f"{number:05d}" for number in range(1, 1100)]
    ids += [str(number) for number in range(1, 200)]
    # More than a page of keys between two cuts, and the cuts themselves.
    ids += [str(number) for number in range(100_000, 101_050)]
    ids += ["535234", "99999", "9999999", "00", "abc", "-1", "~"]
    keys = {f"metadata/{bin_id}.json" for bin_id in ids} | {"metadata/10", "metadata/53"}
    source = make_bucket(dict.fromkeys(keys, b"{}") | {"other/00001.json": b"{}"})
    assert [row["key"] for row in listed(source, "metadata/")] == sorted(keys)


def test_a_listing_has_sizes_and_in_s3_the_md5(make_bucket: MakeBucket) -> None:
    source = make_bucket({KEY: CONTENT, "bin-images/00001.jpg": b"jpeg"})
    etag = MD5 if source.endpoint else None
    (row,) = listed(source, "metadata/")
    del row["stamp"]
    assert row == {"key": KEY, "size": len(CONTENT), "etag": etag}


def test_a_changed_object_has_another_stamp(make_bucket: MakeBucket) -> None:
    source = make_bucket({KEY: CONTENT})
    stamps = {listed(source, "metadata/")[0]["stamp"] for _ in range(2)}
    obstore.put(open_bucket(source), KEY, CONTENT.replace(b"3", b"4"))
    stamps |= {row["stamp"] for row in listed(source, "metadata/")}
    assert len(stamps) == 2
    assert None not in stamps


def test_keys_below_a_prefix_are_relative_to_it(s3: S3, tmp_path: Path) -> None:
    objects = {f"deep/er/metadata/{number:04d}.json": b"{}" for number in range(1100)}
    for whole in (s3.make_bucket(objects), folder_bucket(tmp_path / "bucket", objects)):
        source = whole.model_copy(update={"url": f"{whole.url}/deep/er"})
        rows = listed(source, "metadata/")
        assert [row["key"] for row in rows] == [f"metadata/{n:04d}.json" for n in range(1100)]
        assert read(open_bucket(source), rows[7]["key"], 2, rows[7]["etag"]) == b"{}"


def test_a_folder_with_a_space_in_its_name_is_read(tmp_path: Path) -> None:
    source = folder_bucket(tmp_path / "my bins é", {KEY: CONTENT})
    assert [row["key"] for row in listed(source, "metadata/")] == [KEY]


def test_an_empty_prefix_lists_nothing(make_bucket: MakeBucket) -> None:
    assert listed(make_bucket({KEY: CONTENT}), "bin-images/") == []


def test_an_object_is_read_as_it_was_put(make_bucket: MakeBucket) -> None:
    content = bytes(range(256)) * 300
    source = make_bucket({KEY: content, "metadata/empty": b""})
    for row in listed(source, "metadata/"):
        data = read(open_bucket(source), row["key"], row["size"], row["etag"])
        assert data == (content if row["key"] == KEY else b"")


def test_a_missing_object_is_an_object_error(make_bucket: MakeBucket) -> None:
    store = open_bucket(make_bucket({KEY: CONTENT}))
    with pytest.raises(ObjectError, match="not found"):
        read(store, "metadata/00002.json", 3, None)


def test_an_object_of_another_size_is_an_object_error(make_bucket: MakeBucket) -> None:
    store = open_bucket(make_bucket({KEY: CONTENT}))
    with pytest.raises(ObjectError, match=f"has {len(CONTENT)} bytes, 3 are listed"):
        read(store, KEY, 3, None)


def test_an_object_that_changed_is_an_object_error(s3: S3) -> None:
    source = s3.make_bucket({KEY: CONTENT})
    obstore.put(open_bucket(source), KEY, CONTENT.replace(b"3", b"4"))
    with pytest.raises(ObjectError, match="changed since it was listed"):
        read(open_bucket(source), KEY, len(CONTENT), MD5)


class Answer:
    """An answer of obstore.get_async."""

    def __init__(self, data: bytes, etag: str) -> None:
        self.data, self.meta = data, {"e_tag": f'"{etag}"', "size": len(data)}

    async def bytes_async(self) -> bytes:
        return self.data


def answer(monkeypatch: pytest.MonkeyPatch, contents: Iterable[bytes], etag: str) -> None:
    """Let obstore return these contents, one after another."""
    remaining = iter(contents)

    async def get_async(*_: object) -> Answer:
        return Answer(next(remaining), etag)

    monkeypatch.setattr(obstore, "get_async", get_async)


def test_a_retry_is_counted_even_if_another_shard_ends_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader = Reader(S3Store("bins"))
    attempts: list[str] = []

    async def get_async(_: object, key: str) -> Answer:
        attempts.append(key)
        if len(attempts) == 1:
            reader.take_retried()
            raise GenericError("network")
        return Answer(CONTENT, MD5)

    monkeypatch.setattr(obstore, "get_async", get_async)
    assert asyncio.run(reader.read(KEY, len(CONTENT), MD5)) == CONTENT
    assert reader.take_retried() == {"network error": 1}


@pytest.mark.parametrize("damaged", [CONTENT[:-1], CONTENT.replace(b"3", b"4")])
def test_content_damaged_on_the_way_is_read_once_more(
    monkeypatch: pytest.MonkeyPatch, damaged: bytes
) -> None:
    # Our server cannot be made to damage its answers.
    answer(monkeypatch, [damaged, CONTENT], MD5)
    assert read(S3Store("bins"), KEY, len(CONTENT), MD5) == CONTENT


def test_content_that_stays_damaged_is_an_object_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, repeat(CONTENT.replace(b"3", b"4")), MD5)
    with pytest.raises(ObjectError, match=f"its etag is {MD5}: damaged, or encrypted by KMS"):
        read(S3Store("bins"), KEY, len(CONTENT), MD5)


def test_an_etag_that_is_not_an_md5_is_only_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    # The etag of an upload in parts.
    etag = f"{MD5}-2"
    answer(monkeypatch, [CONTENT], etag)
    assert read(S3Store("bins"), KEY, len(CONTENT), etag) == CONTENT


def test_a_missing_bucket_is_named(s3: S3) -> None:
    with pytest.raises(UserError, match=r"s3://no-such-bucket at http\S+ does not exist"):
        listed(s3.locate("no-such-bucket"), "metadata/")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    source = folder_bucket(tmp_path / "bucket", {}).model_copy(update={"url": "file:///no/such"})
    with pytest.raises(UserError, match=r"bucket\.url: there is no folder /no/such"):
        listed(source, "metadata/")


@pytest.mark.usefixtures("short_deadline")
def test_a_server_that_does_not_answer_is_named() -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    source = params.Bucket(
        url="s3://aft-vbi-pds", region="us-east-1", endpoint=endpoint, anonymous=True
    )
    with pytest.raises(UserError, match=f"s3://aft-vbi-pds at {endpoint} cannot be read") as caught:
        listed(source, "metadata/")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy"])
def test_clients_reach_loopback_without_the_users_proxy(
    monkeypatch: pytest.MonkeyPatch, s3: S3, name: str
) -> None:
    monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    assert [row["key"] for row in listed(s3.make_bucket({KEY: CONTENT}), "metadata/")] == [KEY]


def test_an_endpoint_in_the_environment_is_ignored(monkeypatch: pytest.MonkeyPatch, s3: S3) -> None:
    source = s3.make_bucket({KEY: CONTENT})
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    assert [row["key"] for row in listed(source, "metadata/")] == [KEY]
