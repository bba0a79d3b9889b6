"""Reading objects: many at once, checked against their listing, and with retries."""

import asyncio
import hashlib
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import obstore
import uvloop
from obstore.exceptions import BaseError
from obstore.store import LocalStore
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from stages.collecting.bucket import Store
from stages.collecting.failures import (
    DamagedError,
    ObjectError,
    RefusedError,
    StoreError,
    TransientError,
    failure_of,
)

T = TypeVar("T")

# S3 answers in about 30 ms, so 256 concurrent requests read 8,000 objects/s. A disk answers at
# once, and each of its readers needs an open file.
REQUESTS = 256
DISK_REQUESTS = 8
# For each of the many tasks on a cluster.
TASK_REQUESTS = 32
# Seconds for which a request is retried. Together with its time-out and a look at the whole store,
# an outage is reported within a minute.
DEADLINE = 35.0
PROBE_SECONDS = 3.0
LONGEST_WAIT = 4.0


class Reader:
    """Reads the objects of a store, `requests` at once.

    `witness` is the key of an object that has been read before. When the store refuses an object,
    reading the witness again tells whether it refuses everything: credentials expire, and buckets
    are removed, in the middle of a run.
    """

    def __init__(self, store: Store, requests: int = REQUESTS, witness: str | None = None) -> None:
        self.store = store
        self.witness = witness
        self.retried: Counter[str] = Counter()
        self._requests = min(requests, DISK_REQUESTS) if isinstance(store, LocalStore) else requests
        # A semaphore belongs to one event loop, and read_all starts a new one each time.
        self._turns: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """On a cluster, each task counts its own retries and shares the store with many others."""
        return Reader, (self.store, TASK_REQUESTS, self.witness)

    def take_retried(self) -> Counter[str]:
        """The retries since the last call, by kind."""
        # Other requests hold on to this counter while they wait.
        retried = self.retried.copy()
        self.retried.clear()
        return retried

    def read_all(self, rows: Sequence[dict[str, Any]]) -> list[bytes | ObjectError]:
        """The objects of `rows` (key, size, etag), in order; in place of one, what is wrong."""

        async def one(row: dict[str, Any]) -> bytes | ObjectError:
            try:
                return await self.read(row["key"], row["size"], row["etag"])
            except ObjectError as error:
                return error

        async def all_of_them() -> list[bytes | ObjectError]:
            return await asyncio.gather(*map(one, rows))

        return uvloop.run(all_of_them())

    async def read(self, key: str, size: int, etag: str | None) -> bytes:
        """The object's bytes, checked against its listed size and etag, and its MD5 if known.

        An S3 etag of 32 hexadecimal digits is the content's MD5, except for objects encrypted with
        keys of KMS or the customer. Those are refused, because obstore does not pass on the header
        that tells them from damaged ones. Raises ObjectError if this object is at fault; otherwise
        StoreError, OSError or obstore's own error.
        """
        async with self._turn():
            try:
                data = await self._read_checked(key, size, etag)
            except RefusedError:
                await self._check_store()
                raise
            except TransientError as failed:
                await self._check_store()
                raise ObjectError(f"{failed.kind}, repeatedly") from None
            self.witness = key
            return data

    def _turn(self) -> asyncio.Semaphore:
        loop = asyncio.get_running_loop()
        if loop not in self._turns:
            self._turns = {loop: asyncio.Semaphore(self._requests)}
        return self._turns[loop]

    async def _read_checked(self, key: str, size: int, etag: str | None) -> bytes:
        """Read again, once, if the content is not what was listed."""

        def read_once() -> Awaitable[bytes]:
            return _read_once(self.store, key, size, etag)

        try:
            return await patiently(read_once, self.retried)
        except DamagedError as damaged:
            self.retried[damaged.kind] += 1
        return await patiently(read_once, self.retried)

    async def _check_store(self) -> None:
        """Raise if nothing else can be read either, so that the object is not to blame."""
        try:
            await patiently(self._probe, self.retried, PROBE_SECONDS)
        except TransientError as failed:
            raise failed.error from None
        except RefusedError as refused:
            known = self.witness or "its listing"
            raise StoreError(
                f"no longer gives {known}, which it gave before ({refused}): credentials expired,"
                " access was withdrawn, or it was removed. Restore it; the next run continues where"
                " this one stopped"
            ) from None

    async def _probe(self) -> None:
        try:
            if self.witness is not None:
                await (await obstore.get_async(self.store, self.witness)).bytes_async()
            else:
                listed = await anext(aiter(obstore.list(self.store, chunk_size=1)), None)
                if not listed:
                    raise RefusedError("nothing is there any more")
        except (BaseError, FileNotFoundError) as error:
            raise failure_of(error, self.store, self.witness or "") from None


async def patiently(
    request: Callable[[], Awaitable[T]], retried: Counter[str], seconds: float | None = None
) -> T:
    """Await `request`; retry transient errors for `seconds` (by default DEADLINE)."""

    def count(state: RetryCallState) -> None:
        retried[_kind(state)] += 1

    try:
        # The usual case, without the cost of setting up retries.
        return await request()
    except TransientError as failed:
        retried[failed.kind] += 1
    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type(TransientError),
        stop=stop_after_delay(DEADLINE if seconds is None else seconds),
        wait=wait_random_exponential(0.05, max=LONGEST_WAIT),
        before_sleep=count,
        reraise=True,
    ):
        with attempt:
            return await request()
    raise AssertionError("the last attempt returns or raises")


def _kind(state: RetryCallState) -> str:
    error = state.outcome.exception() if state.outcome else None
    return error.kind if isinstance(error, TransientError) else "other error"


async def _read_once(store: Store, key: str, size: int, etag: str | None) -> bytes:
    try:
        result = await obstore.get_async(store, key)
        found = (result.meta["e_tag"] or "").strip('"')
        if etag is not None and found != etag:
            reason = "changed since it was listed: run `dvc repro --force index`"
            raise DamagedError("changed object", reason)
        # Before it is read: the body may be larger than memory.
        _check_size(result.meta["size"], size)
        data = bytes(await result.bytes_async())
    except (BaseError, FileNotFoundError) as error:
        raise failure_of(error, store, key) from None
    _check_size(len(data), size)
    if etag is not None and _is_md5(etag) and _md5(data) != etag:
        reason = (
            f"content has the MD5 {_md5(data)}, its etag is {etag}: damaged, or encrypted by KMS,"
            " which is not supported (copy the bucket to one without, or to a folder)"
        )
        raise DamagedError("damaged body", reason)
    return data


def _check_size(found: int, listed: int) -> None:
    if found != listed:
        raise DamagedError("cut body", f"has {found} bytes, {listed} are listed")


def _is_md5(etag: str) -> bool:
    return re.fullmatch("[0-9a-f]{32}", etag) is not None


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def summary(retried: Counter[str]) -> str:
    """Like "; retried 16: 9 x server error 503, 7 x network error", most frequent first."""
    if not retried:
        return ""
    kinds = sorted(retried.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{number} x {kind}" for kind, number in kinds)
    return f"; retried {retried.total()}: {named}"
