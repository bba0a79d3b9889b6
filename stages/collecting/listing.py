"""Listing a bucket: in parallel ranges if the server supports them, otherwise in sequence."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import obstore
import pyarrow as pa
import pyarrow.compute as pc
import uvloop
from obstore.exceptions import BaseError, InvalidPathError
from obstore.store import LocalStore

from stages.collecting.bucket import Store
from stages.collecting.failures import RefusedError, StoreError, TransientError, failure_of
from stages.collecting.reading import patiently

PAGE = 1000
#: `stamp` tells whether an object has changed: the etag or, in a folder, a text of inode, time and
#: size. It differs from machine to machine, so it may identify unfinished work, but not an output.
LISTING = pa.schema(
    [("key", pa.string()), ("size", pa.int64()), ("etag", pa.string()), ("stamp", pa.string())]
)


class _OutOfOrderError(Exception):
    """The server does not list in key order, or not after the key that it was given."""


def list_objects(store: Store, prefix: str, retried: Counter[str] | None = None) -> pa.Table:
    """Every object below `prefix`, which ends in "/", as LISTING, sorted by key.

    S3 lists at most 1,000 keys per request, in key order. A long listing is therefore read in
    parallel ranges, cut at the first two digits of the keys. Some S3-compatible servers do not
    sort, or ignore the key to start after; these are listed in sequence.
    """
    found = uvloop.run(_list_objects(store, prefix, Counter() if retried is None else retried))
    return found.sort_by("key")


async def _list_objects(store: Store, prefix: str, retried: Counter[str]) -> pa.Table:
    first = await anext(_pages(store, prefix, retried), LISTING.empty_table())
    if len(first) < PAGE:
        return first
    if not isinstance(store, LocalStore):
        with suppress(_OutOfOrderError):
            return await _list_ranges(store, prefix, retried, first)
    return await _list_in_sequence(store, prefix, retried)


async def _list_ranges(
    store: Store, prefix: str, retried: Counter[str], first: pa.Table
) -> pa.Table:
    last_key = first["key"][-1].as_py()
    cuts = [f"{prefix}{number:02d}" for number in range(100)]
    starts = [last_key, *(cut for cut in cuts if cut > last_key)]
    ranges = zip(starts, [*starts[1:], None], strict=True)
    listed = [_list_range(store, prefix, retried, start, stop) for start, stop in ranges]
    return pa.concat_tables([_above(first, None), *await asyncio.gather(*listed)])


async def _list_range(
    store: Store, prefix: str, retried: Counter[str], start: str, stop: str | None
) -> pa.Table:
    """The objects with keys above `start`, up to and including `stop`."""
    tables = [LISTING.empty_table()]
    last = start
    async for page in _pages(store, prefix, retried, start):
        tables.append(_above(page, last))
        last = page["key"][-1].as_py()
        if stop is not None and last > stop:
            break
    found = pa.concat_tables(tables)
    return found if stop is None else found.filter(pc.less_equal(found["key"], stop))


def _above(page: pa.Table, last: str | None) -> pa.Table:
    """The page without the key `last`, which some servers repeat.

    Raises _OutOfOrderError if the page is not sorted, or begins before `last`.
    """
    keys = page["key"].combine_chunks()
    rises = pc.all(pc.less(keys[:-1], keys[1:])).as_py()
    if rises is False or (last is not None and keys[0].as_py() < last):
        raise _OutOfOrderError
    return page.slice(1) if keys[0].as_py() == last else page


async def _list_in_sequence(store: Store, prefix: str, retried: Counter[str]) -> pa.Table:
    """Read page after page, in whatever order. Raises StoreError if they never end."""
    tables: list[pa.Table] = []
    seen: set[str] = set()
    async for page in _pages(store, prefix, retried):
        is_new = [key not in seen for key in page["key"].to_pylist()]
        seen.update(page["key"].to_pylist())
        if not any(is_new):
            raise StoreError("lists the same objects over and over: its server is faulty")
        tables.append(page.filter(pa.array(is_new)))
    return pa.concat_tables(tables)


async def _pages(
    store: Store, prefix: str, retried: Counter[str], start: str | None = None
) -> AsyncIterator[pa.Table]:
    """The objects after the key `start`, PAGE at a time."""
    stream: AsyncIterator[Any] | None = None
    last = start

    async def next_page() -> Any:
        nonlocal stream
        try:
            if stream is None:
                stream = aiter(
                    obstore.list(store, prefix, offset=last, chunk_size=PAGE, return_arrow=True)
                )
            return await anext(stream, None)
        except InvalidPathError:
            raise
        except BaseError as error:
            failure = failure_of(error, store, prefix)
            # A continuation token may have expired: try again from the last key.
            if isinstance(failure, RefusedError):
                failure = error if last == start else TransientError("refused page", error)
            stream = None
            raise failure from None

    try:
        while (batch := await patiently(next_page, retried)) is not None:
            page = _table(store, batch)
            yield page
            last = page["key"][-1].as_py()
    except TransientError as failed:
        raise failed.error from None


def _table(store: Store, batch: Any) -> pa.Table:
    found = pa.table(batch)
    keys, stamps = found["path"].cast(pa.string()), found["e_tag"].cast(pa.string())
    stamps = pc.replace_substring(stamps, '"', "")
    # In a folder, obstore makes etags of inode and time, which differ from machine to machine.
    etags = pa.nulls(len(keys), pa.string()) if isinstance(store, LocalStore) else stamps
    return pa.table([keys, found["size"].cast(pa.int64()), etags, stamps], schema=LISTING)
