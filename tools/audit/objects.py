"""The files of a folder or of S3 that audits read: <id>.jpg and <id>.json."""

import re
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pydantic
from obstore.store import LocalStore

from stages.collecting.awaiting import await_in_order
from stages.collecting.bucket import (
    IN_FLIGHT,
    WINDOW,
    Names,
    ObjectError,
    Store,
    list_objects,
    open_bucket,
    read_object,
)
from stages.collecting.records import is_bin_id
from stages.collecting.retries import Retries
from stages.runtime import params
from stages.runtime.errors import UserError

#: The audit's options, in messages.
OPTIONS = Names("its name", "--endpoint", "add --signed")
_ROWS = 1000
_DISK_READERS = 8


class Content(NamedTuple):
    """The bytes of a bin's file, or the problem with it."""

    id: str
    data: bytes
    problem: str = ""


class Listing(NamedTuple):
    """`objects`: a row per bin, in the order of the keys: id, key, size, etag and stamp.

    `left_out`: the keys that would be of bins if their names were ids.
    """

    objects: pa.Table
    left_out: list[str]


def open_folder(folder: Path) -> Store:
    return open_bucket(_bucket(folder.absolute().as_uri(), None, "us-east-1", signed=False))


def open_s3(url: str, endpoint: str | None, region: str, *, signed: bool) -> Store:
    """Raises UserError where one of these is malformed, without repeating it: it may hold a key."""
    try:
        return open_bucket(_bucket(url, endpoint, region, signed=signed))
    except pydantic.ValidationError as error:
        (wrong, *_) = error.errors()[0]["loc"]
        forms = {
            "url": "photographs are in a form like s3://bucket/prefix",
            "endpoint": "--endpoint is in a form like http://127.0.0.1:9000",
            "region": "--region is in a form like us-east-1",
        }
        raise UserError(forms[str(wrong)]) from None


def _bucket(url: str, endpoint: str | None, region: str, *, signed: bool) -> params.Bucket:
    return params.Bucket(url=url, region=region, endpoint=endpoint, anonymous=not signed)


def list_bins(store: Store, prefix: str, suffix: str) -> Listing:
    """The files right below `prefix` ("" or ending in "/") with a suffix, a pattern like "jpe?g".

    Raises UserError where two are of one bin, as 1.jpg and 1.JPG.
    """
    found = list_objects(store, prefix)
    named = re.compile(rf"(?P<id>[^/]+)\.{suffix}", re.IGNORECASE)
    matches = [named.fullmatch(key.removeprefix(prefix)) for key in found["key"].to_pylist()]
    ids = [match["id"] if match and is_bin_id(match["id"]) else None for match in matches]
    pairs = zip(found["key"].to_pylist(), matches, ids, strict=True)
    left_out = [key for key, match, bin_id in pairs if match and bin_id is None]
    objects = found.append_column("id", pa.array(ids, pa.string())).filter(
        pc.field("id").is_valid()
    )
    refuse_twins(objects["id"].to_pylist(), "files")
    return Listing(objects, left_out)


def refuse_twins(ids: list[str], what: str) -> None:
    """Raise UserError where an id occurs twice."""
    seen: set[str] = set()
    for bin_id in ids:
        if bin_id in seen:
            raise UserError(f"there are two {what} of the bin {bin_id}: keep one")
        seen.add(bin_id)


def read_bins(store: Store, objects: pa.Table) -> Generator[Content, None, None]:
    """The files in their order, many reads under way; of a disk, which answers at once, few."""
    rows = (row for batch in objects.to_batches(_ROWS) for row in batch.to_pylist())
    read = partial(_read, store, Retries())
    if isinstance(store, LocalStore):
        return await_in_order(read, rows, _DISK_READERS, 8 * _DISK_READERS)
    return await_in_order(read, rows, IN_FLIGHT, WINDOW)


async def _read(store: Store, retries: Retries, row: dict[str, Any]) -> Content:
    try:
        data = await read_object(store, row["key"], row["size"], row["etag"], retries)
        return Content(row["id"], data)
    except ObjectError as error:
        # Its advice after the colon is for the pipeline.
        return Content(row["id"], b"", str(error).partition(":")[0])
