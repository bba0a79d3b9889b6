"""Listing where a key is no path, like metadata//1.json or ../1.json, which obstore refuses whole.

Such an object has no possible id and is never read, but it must not hide the others.
"""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from obstore.store import LocalStore, S3Store

from stages.collecting.retries import FailedAttempt


class Listed(NamedTuple):
    key: str
    size: int
    etag: str


def list_next(
    store: S3Store | LocalStore, prefix: str, offset: str | None, seconds: float
) -> list[Listed]:
    """The objects below `prefix` after the key `offset`, in order: a page of S3's, or all.

    Raises FailedAttempt where the server does not answer for so many seconds.
    """
    if isinstance(store, LocalStore):
        found = sorted(_files(str(store.prefix), prefix))
        return [one for one in found if offset is None or one.key > offset]
    inner = f"{store.prefix}/" if store.prefix else ""
    after = {} if offset is None else {"StartAfter": inner + offset}
    bucket = store.config["bucket"]
    try:
        page = _client(store, seconds).list_objects_v2(
            Bucket=bucket, Prefix=inner + prefix, **after
        )
    # Their texts repeat the server's answer, and go nowhere.
    except (BotoCoreError, ClientError):
        raise FailedAttempt(
            "failed listing", "failed listing, time and again", definite=False
        ) from None
    return [
        Listed(found["Key"].removeprefix(inner), found["Size"], found["ETag"].strip('"'))
        for found in page.get("Contents", [])
    ]


def _client(store: S3Store, seconds: float) -> Any:
    config = store.config
    unsigned = {"signature_version": UNSIGNED} if config.get("skip_signature") else {}
    return boto3.client(
        "s3",
        region_name=config.get("region"),
        endpoint_url=config.get("endpoint"),
        config=Config(
            connect_timeout=seconds,
            read_timeout=seconds,
            retries={"total_max_attempts": 1},
            s3={"addressing_style": "path"},
            **unsigned,
        ),
    )


def _files(root: str, prefix: str) -> Iterator[Listed]:
    for folder, _, names in os.walk(os.path.join(root, prefix)):  # noqa: PTH118 - 500,000 of them
        for name in names:
            path = os.path.join(folder, name)  # noqa: PTH118
            status = os.stat(path)  # noqa: PTH116
            # A name may be no Unicode; then it is no id either.
            key = os.path.relpath(path, root).encode("utf-8", "backslashreplace").decode()
            stamp = f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"
            yield Listed(key, status.st_size, stamp)
