"""The bucket of photographs and records: listing it and reading its objects, checked."""

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import obstore
import pyarrow as pa
import pyarrow.compute as pc
import uvloop
from obstore.exceptions import (
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, S3Store

from stages.collecting.odd_keys import list_next
from stages.collecting.retries import DEADLINE, FailedAttempt, Retries
from stages.runtime import params
from stages.runtime.errors import UserError

RECORDS = "metadata/"
PHOTOGRAPHS = "bin-images/"
# S3 answers in some 30 ms; 256 requests under way are 8,000 objects a second.
IN_FLIGHT = 256
# Results waiting behind a slow one. More than IN_FLIGHT, so that one slow object stops nobody.
WINDOW = 4 * IN_FLIGHT
# Bytes that may be held of what is read but not yet written.
READ_BYTES = 1024 * 1024 * 1024
LIST_PAGE = 1000
# Seconds: without a byte, and for a whole answer, which 256 at once on a slow line need.
STALL_TIMEOUT = 5
ANSWER_TIMEOUT = 30
# To find out whether one object fails, or the store.
PROBE_SECONDS = 3

Store = S3Store | LocalStore
#: `stamp` tells whether an object changed on this machine: the etag or, in a folder, which has no
#: etags, a text of inode, time and size. It may name unfinished work, and go into no output.
LISTING = pa.schema(
    [("key", pa.string()), ("size", pa.int64()), ("etag", pa.string()), ("stamp", pa.string())]
)


# How obstore's errors without an HTTP status are told apart, by the dump of their sources.
_KINDS = {
    "kind: Timeout": "time-out",
    "kind: Connect,": "failed connection",
    "IncompleteBody": "cut body",
    "kind: Interrupted": "reset",
    "invalid list response": "damaged listing",
}


class ObjectError(Exception):
    """One object cannot be had as it was listed; the text is the reason."""


def open_bucket(bucket: params.Bucket) -> Store:
    """Raises UserError where `bucket.url` is a folder that does not exist."""
    parts = urlsplit(bucket.url)
    if parts.scheme == "file":
        folder = Path(unquote(parts.path))
        if not folder.is_dir():
            raise UserError(f"bucket.url: there is no folder {folder}")
        return LocalStore(folder)
    endpoint = bucket.endpoint or f"https://s3.{bucket.region}.amazonaws.com"
    return S3Store(
        parts.netloc,
        prefix=parts.path.strip("/") or None,
        region=bucket.region,
        # Named also for Amazon's own, so that an AWS_ENDPOINT_URL meant for the DVC remote is
        # not followed here.
        endpoint=endpoint,
        skip_signature=bucket.anonymous,
        client_options={
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=5),
            "read_timeout": timedelta(seconds=STALL_TIMEOUT),
            "timeout": timedelta(seconds=ANSWER_TIMEOUT),
        },
        # Retries tries again: it counts, and knows what a right answer is.
        retry_config={"max_retries": 0},
    )


class Names(NamedTuple):
    """What a user sets, as messages call it."""

    url: str = "bucket.url"
    endpoint: str = "bucket.endpoint"
    sign: str = "set bucket.anonymous to false"


def explained(bucket: params.Bucket) -> AbstractContextManager[None]:
    """Turn what the store raises into a UserError that names the bucket and what to do."""
    place = bucket.url + (f" at {bucket.endpoint}" if bucket.endpoint else "")
    return explained_at(place, Names(), anonymous=bucket.anonymous)


@contextmanager
def explained_at(place: str, names: Names, *, anonymous: bool) -> Iterator[None]:
    try:
        yield
    except BaseError as error:
        what = _what_to_do(error, names, anonymous=anonymous)
        raise UserError(f"{place} {what}") from None


def list_objects(store: Store, prefix: str, retries: Retries | None = None) -> pa.Table:
    """Every object below `prefix` (it ends in "/"): key, size, etag (null in a folder) and stamp.

    S3 lists at most 1,000 keys a request, in the order of the keys, so a long listing is read in
    parallel ranges, cut at the keys' first two digits.
    """
    return uvloop.run(_list_objects(store, prefix, retries or Retries()))


async def _list_objects(store: Store, prefix: str, retries: Retries) -> pa.Table:
    pages = _pages(store, prefix, retries)
    first = await anext(pages, None)
    if first is None:
        return LISTING.empty_table()
    if isinstance(store, LocalStore) or first.num_rows < LIST_PAGE:
        tables = [first, *[page async for page in pages]]
    else:
        last_key = first["key"][-1].as_py()
        cuts = [f"{prefix}{number:02d}" for number in range(100)]
        starts = [last_key, *(cut for cut in cuts if cut > last_key)]
        ranges = zip(starts, [*starts[1:], None], strict=True)
        listed = [_list_range(store, prefix, retries, start, stop) for start, stop in ranges]
        tables = [first, *await asyncio.gather(*listed)]
    return pa.concat_tables(tables).sort_by("key")


async def _list_range(
    store: Store, prefix: str, retries: Retries, start: str, stop: str | None
) -> pa.Table:
    """The objects whose key is above `start` and not above `stop`."""
    tables = [LISTING.empty_table()]
    async for page in _pages(store, prefix, retries, start):
        if stop is not None and page["key"][-1].as_py() > stop:
            tables.append(page.filter(pc.less_equal(page["key"], stop)))
            break
        tables.append(page)
    return pa.concat_tables(tables)


async def _pages(
    store: Store, prefix: str, retries: Retries, offset: str | None = None
) -> AsyncIterator[pa.Table]:
    """The listing after the key `offset`. Raises what the store raised, tried for DEADLINE."""
    batches: AsyncIterator[Any] | None = None

    async def next_page() -> pa.Table | None:
        nonlocal batches
        try:
            if batches is None:
                batches = aiter(_list(store, prefix, offset))
            batch = await anext(batches, None)
        # A key is no path, or the one after which to go on (a ValueError).
        except (InvalidPathError, ValueError):
            batches = None
            return await _odd_page(store, prefix, offset)
        except BaseError as error:
            # Its continuation token may have expired: the next attempt begins after the last key.
            batches = None
            raise _failed(error) from None
        return None if batch is None else _page(store, batch)

    try:
        while (page := await retries.run(next_page, _patience(store))) is not None:
            yield page
            offset = page["key"][-1].as_py()
    except FailedAttempt as failed:
        raise failed.error or failed from None


def _list(store: Store, prefix: str, offset: str | None) -> Any:
    return obstore.list(store, prefix, offset=offset, chunk_size=LIST_PAGE, return_arrow=True)


def _page(store: Store, batch: Any) -> pa.Table:
    table = pa.table(batch)
    stamp = pc.replace_substring(table["e_tag"].cast(pa.string()), '"', "")
    return _listing(store, table["path"].cast(pa.string()), table["size"], stamp)


async def _odd_page(store: Store, prefix: str, offset: str | None) -> pa.Table | None:
    found = await asyncio.to_thread(list_next, store, prefix, offset, STALL_TIMEOUT)
    if not found:
        return None
    keys, sizes, stamps = (pa.array(column) for column in zip(*found, strict=True))
    return _listing(store, keys, sizes, stamps)


def _listing(store: Store, keys: Any, sizes: Any, stamps: Any) -> pa.Table:
    # A folder's etag is made of inode and time, which differ from machine to machine.
    etags = pa.nulls(len(keys), pa.string()) if isinstance(store, LocalStore) else stamps
    return pa.table([keys, sizes.cast(pa.int64()), etags, stamps], schema=LISTING)


def window_of(largest: int) -> int:
    """How many objects may be read ahead, of which the largest has so many bytes."""
    return max(1, min(WINDOW, READ_BYTES // max(1, largest)))


async def read_object(
    store: Store, key: str, size: int, etag: str | None, retries: Retries | None = None
) -> bytes:
    """The object's bytes, as listed: of that size and etag, and of that MD5 where the etag is one.

    An S3 etag of 32 hexadecimal digits is the content's MD5, but for objects encrypted with keys
    of KMS or the customer. Those are refused: obstore does not give the header that tells them
    from damaged ones. Raises ObjectError where this object cannot be had, after DEADLINE seconds
    or, where the store says so each time, ATTEMPTS; and obstore's own error where nothing can.
    """
    retries = retries or Retries()
    start = time.monotonic()
    try:
        data = await retries.run(lambda: _read_once(store, key, size, etag), _patience(store))
    except FailedAttempt as failed:
        if failed.error is not None and not failed.definite:
            await _raise_outage(store, retries, start, failed.error)
        raise ObjectError(str(failed)) from None
    retries.last_read = (key, time.monotonic())
    return data


async def _read_once(store: Store, key: str, size: int, etag: str | None) -> bytes:
    try:
        result = await obstore.get_async(store, key)
        found = (result.meta["e_tag"] or "").strip('"')
        if etag is not None and found != etag:
            reason = "changed since it was listed: run `dvc repro --force index`"
            raise FailedAttempt("changed object", reason, definite=True)
        # Before it is read: the body may be far larger than what there is memory for.
        if result.meta["size"] != size:
            reason = f"has {result.meta['size']} bytes, {size} are listed"
            raise FailedAttempt("cut body", reason, definite=True)
        data = bytes(await result.bytes_async())
    except (BaseError, FileNotFoundError) as error:
        raise _failed(error) from None
    if len(data) != size:
        reason = f"has {len(data)} bytes, {size} are listed"
        raise FailedAttempt("cut body", reason, definite=True)
    if etag is not None and _is_md5(etag) and _md5(data) != etag:
        reason = (
            f"content has the MD5 {_md5(data)}, its etag is {etag}: damaged, or encrypted by"
            " KMS, which is not supported (copy the bucket to one without, or to a folder)"
        )
        raise FailedAttempt("damaged body", reason, definite=True)
    return data


async def _raise_outage(store: Store, retries: Retries, since: float, error: Exception) -> None:
    """Raise `error` in all readers if the store gives nothing else either.

    It is asked for what it gave before: a server may list what it cannot read. Only where nothing
    was read yet is it asked for a listing.
    """

    async def probe() -> None:
        try:
            if retries.last_read is not None:
                await (await obstore.get_async(store, retries.last_read[0])).bytes_async()
            else:
                await anext(aiter(obstore.list(store, chunk_size=1)), None)
        except (BaseError, FileNotFoundError) as problem:
            raise _failed(problem) from None

    if retries.last_read is not None and retries.last_read[1] > since:
        return
    try:
        await retries.run(probe, PROBE_SECONDS)
    except FailedAttempt as failed:
        if not failed.definite:
            retries.outage = error
            raise error from None


def _patience(store: Store) -> float:
    """For how many seconds to try: what a folder says is final."""
    return 0 if isinstance(store, LocalStore) else DEADLINE


def _failed(error: BaseError | FileNotFoundError) -> FailedAttempt:
    """What obstore's error means. Its text repeats the server's answer, and goes nowhere."""
    text = str(error)
    status = re.search(r"status code: (\d{3})", text)
    if isinstance(error, FileNotFoundError):
        return FailedAttempt("not found", "not found", definite=True, error=error)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return FailedAttempt("access denied", "access denied", definite=True, error=error)
    if status is None:
        kind = next((kind for mark, kind in _KINDS.items() if mark in text), "other error")
        return FailedAttempt(kind, f"{kind}, time and again", definite=False, error=error)
    # 408 and 429 ask for another attempt, as 5xx do.
    refused = status[1].startswith("4") and status[1] not in {"408", "429"}
    kind = "refused request" if refused else "server error"
    return FailedAttempt(kind, f"{kind} {status[1]}, time and again", definite=refused, error=error)


def _is_md5(etag: str) -> bool:
    return re.fullmatch("[0-9a-f]{32}", etag) is not None


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _what_to_do(error: BaseError, names: Names, *, anonymous: bool) -> str:
    # A listing raises its HTTP status inside a generic error, as text.
    text = str(error)
    if "<Code>NoSuchBucket</Code>" in text:
        return f"does not exist: check {names.url} and {names.endpoint}"
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or "403 Forbidden" in text:
        if anonymous:
            return (
                f"refuses access: it does not allow anonymous reads; {names.sign}, and set"
                " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
            )
        return "refuses access: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    return (
        f"cannot be read: {_cause(error)}. Check {names.endpoint} and the network; the next run"
        " goes on where this one stopped"
    )


def _cause(error: BaseError) -> str:
    """The first line of the error's text, short: obstore's carries a dump of all its sources.

    Without what the server answered (XML), in which S3 repeats keys and session tokens.
    """
    text = re.split("<|Got invalid", str(error))[0].strip().partition("\n")[0].rstrip(": ")
    return text if len(text) <= 300 else text[:300] + "..."
