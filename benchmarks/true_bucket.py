"""An S3 server on loopback with a bucket as large as the real one, which needs no disk.

    python -m benchmarks.true_bucket --port 9100 --latency-ms 30

Its bucket aft-vbi-pds has 536,434 records and as many photographs, which are made when they are
requested (benchmarks/true_bins.py). It is read-only: GET (with ranges) and HEAD of objects, and
ListObjectsV2, with any credentials or none. /-/counts has the numbers of requests, which are also
printed at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, cast
from urllib.parse import parse_qsl, quote, unquote
from xml.sax.saxutils import escape

import numpy as np
import uvloop
from tqdm import tqdm

from benchmarks.true_bins import PADDED, TrueBins, make_bins
from tools.s3 import answers, free_port

BUCKET = "aft-vbi-pds"
PHOTOGRAPHS = "bin-images/"
RECORDS = "metadata/"
COUNTS_PATH = "/-/counts"
LIST_PAGE = 1000
# Enough for a busy machine; an idle one takes 15.
START_SECONDS = 300
# Clients open hundreds of connections at once.
BACKLOG = 1024
LONGEST_HEAD = 65_536

_MODIFIED = "Thu, 29 Dec 2016 00:00:00 GMT"
_ENTRY = (
    "<Contents><Key>{key}</Key><LastModified>2016-12-29T00:00:00.000Z</LastModified>"
    "<ETag>&quot;{etag}&quot;</ETag><Size>{size}</Size><StorageClass>STANDARD</StorageClass>"
    "</Contents>"
)
_RESULT = '<?xml version="1.0" encoding="UTF-8"?>\n<{name}>{content}</{name}>'
# Sorts after every character that may follow a prefix.
_LAST = "\U0010ffff"
_RANGE = re.compile(rb"(?i)\r\nrange: *bytes=(\d*)-(\d*) *(?:\r|$)")
_CLOSE = re.compile(rb"(?i)\r\nconnection: *close *(?:\r|$)")

Buffer = bytes | memoryview


class RefusedError(Exception):
    """A request is refused, with an HTTP status and S3's error code."""

    def __init__(self, status: str, code: str) -> None:
        super().__init__(status, code)
        self.status = status
        self.code = code


class Answer(NamedTuple):
    """An HTTP answer. The body is in parts, so that it need not be copied."""

    head: bytes
    body: Sequence[Buffer] = ()


@dataclass
class Counts:
    """The numbers of requests, and the bytes of the bodies that were sent."""

    gets: int = 0
    heads: int = 0
    lists: int = 0
    refused: int = 0
    bytes: int = 0

    def __str__(self) -> str:
        return (
            f"{self.gets:,} GETs, {self.heads:,} HEADs, {self.lists:,} lists,"
            f" {self.refused:,} refused; {self.bytes:,} bytes"
        )


class Listing:
    """The objects in the order of their keys, as XML from which pages are cut."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._entries = bytearray()
        self._offsets = array("q", [0])

    def add(self, key: str, etag: str, size: int) -> None:
        """Append an object. It must be the next in the order of keys."""
        self._keys.append(key)
        self._entries += _ENTRY.format(key=key, etag=etag, size=size).encode()
        self._offsets.append(len(self._entries))

    def page(self, query: Mapping[str, str]) -> list[Buffer]:
        """The parts of a ListBucketResult. Raises RefusedError if the query is invalid."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        most = min(_whole_number(query.get("max-keys", str(LIST_PAGE))), LIST_PAGE)
        start, stop = self._start(query), bisect_left(self._keys, prefix + _LAST)
        entries: Buffer
        if delimiter:
            rolled_up, end = self._rolled_up(start, stop, most, delimiter, len(prefix))
            entries, found = b"".join(rolled_up), len(rolled_up)
        else:
            end = max(start, min(start + most, stop))
            entries, found = self._slice(start, end), end - start
        fields = {
            "Name": BUCKET,
            "MaxKeys": str(most),
            "KeyCount": str(found),
            "IsTruncated": "true" if end < stop else "false",
            **({"NextContinuationToken": str(end)} if end < stop else {}),
            **_repeated(query),
        }
        texts = (f"<{name}>{escape(value)}</{name}>" for name, value in fields.items())
        opening, closing = _RESULT.format(name="ListBucketResult", content="\0").split("\0")
        return [(opening + "".join(texts)).encode(), entries, closing.encode()]

    def _start(self, query: Mapping[str, str]) -> int:
        """The position where the page begins. A continuation token is such a position."""
        if "continuation-token" in query:
            return min(_whole_number(query["continuation-token"]), len(self._keys))
        first = bisect_left(self._keys, query.get("prefix", ""))
        return max(first, bisect_right(self._keys, query.get("start-after", "")))

    def _rolled_up(
        self, start: int, stop: int, most: int, delimiter: str, skipped: int
    ) -> tuple[list[Buffer], int]:
        """At most `most` keys and common prefixes from `start` on, and the position after them.

        A common prefix is a key up to the first delimiter after its `skipped` characters.
        """
        entries: list[Buffer] = []
        while start < stop and len(entries) < most:
            key = self._keys[start]
            cut = key.find(delimiter, skipped)
            if cut < 0:
                entries.append(self._slice(start, start + 1))
                start += 1
            else:
                common = key[: cut + len(delimiter)]
                xml = f"<CommonPrefixes><Prefix>{escape(common)}</Prefix></CommonPrefixes>"
                entries.append(xml.encode())
                start = bisect_left(self._keys, common + _LAST)
        return entries, start

    def _slice(self, start: int, end: int) -> memoryview:
        return memoryview(self._entries)[self._offsets[start] : self._offsets[end]]


def _whole_number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise RefusedError("400 Bad Request", "InvalidArgument")
    return int(text)


def _repeated(query: Mapping[str, str]) -> dict[str, str]:
    """The fields of the query that a page repeats."""
    names = {"prefix": "Prefix", "delimiter": "Delimiter", "start-after": "StartAfter"}
    values = {names[name]: value for name, value in query.items() if name in names}
    if query.get("encoding-type") != "url":
        return values
    # The keys themselves have no characters that need quoting.
    return {name: quote(value) for name, value in values.items()} | {"EncodingType": "url"}


class Bucket:
    """All objects of the bucket, and the answers to requests for them."""

    def __init__(self, bins: TrueBins) -> None:
        """Make every record once, to learn its size and MD5, with a progress bar."""
        self.counts = Counts()
        self._bins = bins
        self._photograph_etags = [_md5(photograph) for photograph in bins.photographs]
        self._record_etags = np.empty(len(bins.quantities), "S32")
        self._listing = Listing()
        ids = sorted(bins.rows)
        for bin_id in ids:
            row = bins.rows[bin_id]
            etag = self._photograph_etags[bins.photograph_of[row]]
            self._listing.add(f"{PHOTOGRAPHS}{bin_id}.jpg", etag, len(bins.photograph(row)))
        for bin_id in tqdm(ids, "making every record once", unit=" records", disable=None):
            row = bins.rows[bin_id]
            record = bins.record(row)
            etag = _md5(record)
            self._record_etags[row] = etag
            self._listing.add(f"{RECORDS}{bin_id}.json", etag, len(record))

    def answer(self, method: str, target: str, headers: bytes) -> Answer:
        """The answer to a request; `headers` begin with a line break."""
        try:
            answer = self._answer(method, target, headers)
        except RefusedError as refused:
            self.counts.refused += 1
            answer = _refusal(refused)
        if method == "HEAD":
            return Answer(answer.head)
        self.counts.bytes += sum(map(len, answer.body))
        return answer

    def _answer(self, method: str, target: str, headers: bytes) -> Answer:
        if method not in {"GET", "HEAD"}:
            raise RefusedError("405 Method Not Allowed", "MethodNotAllowed")
        path, _, query = target.partition("?")
        bucket, _, key = unquote(path).removeprefix("/").partition("/")
        if path == COUNTS_PATH:
            return _whole("200 OK", "application/json", json.dumps(asdict(self.counts)).encode())
        if bucket != BUCKET:
            raise RefusedError("404 Not Found", "NoSuchBucket")
        if key:
            answer = self._object(key, _RANGE.search(headers))
            self.counts.gets += method == "GET"
        elif method == "HEAD":
            answer = _whole("200 OK", "application/xml")
        else:
            answer = self._list(dict(parse_qsl(query, keep_blank_values=True)))
            self.counts.lists += 1
        self.counts.heads += method == "HEAD"
        return answer

    def _list(self, query: Mapping[str, str]) -> Answer:
        if query.get("list-type") != "2":
            raise RefusedError("501 Not Implemented", "NotImplemented")
        return _whole("200 OK", "application/xml", *self._listing.page(query))

    def _object(self, key: str, wanted: re.Match[bytes] | None) -> Answer:
        data, etag, media_type = self._find(key)
        headers = (
            f"Content-Type: {media_type}\r\nLast-Modified: {_MODIFIED}\r\n"
            f'ETag: "{etag}"\r\nAccept-Ranges: bytes\r\n'
        )
        bounds = _bounds(wanted, len(data)) if wanted else None
        if bounds is None:
            return Answer(_head("200 OK", len(data), headers), [data])
        start, stop = bounds
        headers += f"Content-Range: bytes {start}-{stop - 1}/{len(data)}\r\n"
        head = _head("206 Partial Content", stop - start, headers)
        return Answer(head, [memoryview(data)[start:stop]])

    def _find(self, key: str) -> tuple[bytes, str, str]:
        """An object's content, its MD5 and its media type."""
        bin_id = key.rpartition("/")[2].partition(".")[0]
        row = self._bins.rows.get(bin_id)
        if row is not None and key == f"{RECORDS}{bin_id}.json":
            return self._bins.record(row), self._record_etags[row].decode(), "application/json"
        if row is not None and key == f"{PHOTOGRAPHS}{bin_id}.jpg":
            etag = self._photograph_etags[self._bins.photograph_of[row]]
            return self._bins.photograph(row), etag, "image/jpeg"
        raise RefusedError("404 Not Found", "NoSuchKey")


def _bounds(wanted: re.Match[bytes], size: int) -> tuple[int, int] | None:
    """Where the wanted range starts and stops. None if it is invalid: then send everything."""
    first, last = (int(number) if number else None for number in wanted.groups())
    if first is None and last is None:
        return None
    if first is None:
        start, stop = max(0, size - (last or 0)), size
    else:
        start, stop = first, size if last is None else min(last + 1, size)
        if last is not None and last < first:
            return None
    if start >= size:
        raise RefusedError("416 Range Not Satisfiable", "InvalidRange")
    return start, stop


def _refusal(refused: RefusedError) -> Answer:
    content = f"<Code>{refused.code}</Code><Message>{refused.status}</Message>"
    xml = _RESULT.format(name="Error", content=content)
    return _whole(refused.status, "application/xml", xml.encode())


def _whole(status: str, media_type: str, *body: Buffer) -> Answer:
    size = sum(map(len, body))
    return Answer(_head(status, size, f"Content-Type: {media_type}\r\n"), body)


def _head(status: str, size: int, headers: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\n{headers}\r\n".encode()


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


class Connection(asyncio.Protocol):
    """An HTTP/1.1 connection. Requests may arrive before earlier ones have been answered."""

    def __init__(self, bucket: Bucket, latency: float) -> None:
        """`latency` is the time between a request and its answer, in seconds."""
        self._bucket = bucket
        self._latency = latency
        self._unread = b""
        self._last = False
        self._waiting: deque[tuple[Answer, bool]] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have another base class.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        data = self._unread + data
        start = 0
        while not self._last and (end := data.find(b"\r\n\r\n", start)) >= 0:
            self._take(data[start:end])
            start = end + 4
        self._unread = data[start:]
        if len(self._unread) > LONGEST_HEAD and not self._last:
            self._refuse()

    def _take(self, request: bytes) -> None:
        line, _, headers = request.partition(b"\r\n")
        words = line.decode("latin-1").split(" ")
        if len(words) != 3:
            self._refuse()
            return
        method, target, version = words
        answer = self._bucket.answer(method, target, b"\r\n" + headers)
        # Requests with other methods may have a body, which is not read.
        last = method not in {"GET", "HEAD"} or version != "HTTP/1.1"
        self._send_later(answer, last=last or _CLOSE.search(request) is not None)

    def _refuse(self) -> None:
        self._send_later(_refusal(RefusedError("400 Bad Request", "BadRequest")), last=True)

    def _send_later(self, answer: Answer, *, last: bool) -> None:
        self._last = last
        self._waiting.append((answer, last))
        if self._latency:
            asyncio.get_running_loop().call_later(self._latency, self._send_next)
        else:
            self._send_next()

    def _send_next(self) -> None:
        """Send the oldest answer, since timers of the same moment fire in any order."""
        answer, last = self._waiting.popleft()
        if self._transport.is_closing():
            return
        self._transport.writelines([answer.head, *answer.body])
        if last:
            self._transport.close()


async def serve(bucket: Bucket, port: int, latency: float, ready: str) -> None:
    """Serve on 127.0.0.1 until SIGINT or SIGTERM. Prints `ready`, and the counts at the end."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    server = await loop.create_server(
        lambda: Connection(bucket, latency), "127.0.0.1", port, backlog=BACKLOG
    )
    print(ready, flush=True)
    await stopped.wait()
    server.close()
    print(bucket.counts, flush=True)


@contextmanager
def serving_true_bucket(bins: int = PADDED, latency_ms: float = 0) -> Iterator[str]:
    """Serve the bucket, or its first bins, from another process. Yields the server's URL.

    Raises RuntimeError if the server does not start; its reason is on stderr.
    """
    port = free_port()
    options = ["--port", str(port), "--bins", str(bins), "--latency-ms", str(latency_ms)]
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.true_bucket", *options],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as server:
        try:
            _wait_for(server, port)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not answers(port):
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the true bucket's server did not start")
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.true_bucket",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=int, default=9100, help="on 127.0.0.1 (default: 9100)")
    parser.add_argument(
        "--latency-ms",
        type=float,
        default=0,
        help="between a request and its answer; 30 is like S3 (default: 0)",
    )
    parser.add_argument(
        "--bins",
        type=int,
        default=PADDED,
        help="the number of padded ids, from the first one on, with un-padded ones in proportion;"
        f" an id is the same bin in a bucket of any size (default: all {PADDED})",
    )
    options = parser.parse_args()
    if not 1 <= options.bins <= PADDED:
        parser.error(f"--bins must be from 1 to {PADDED}")
    if answers(options.port):
        sys.exit(f"true_bucket: error: port {options.port} is in use; try another --port")
    try:
        run(options.bins, options.port, options.latency_ms)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"true_bucket: error: {error}")


def run(padded: int, port: int, latency_ms: float) -> None:
    started = time.monotonic()
    bucket = Bucket(make_bins(padded))
    # The garbage collector need not visit objects that live as long as the process.
    gc.freeze()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        loop = type(runner.get_loop()).__module__.partition(".")[0]
        ready = (
            f"s3://{BUCKET} is at http://127.0.0.1:{port}, with {loop}; {latency_ms:g} ms latency;"
            f" made in {time.monotonic() - started:.0f} s. Ctrl-C stops it.\n"
            f"  dvc exp run -S bucket.endpoint=http://127.0.0.1:{port}\n"
            f"  s5cmd --no-sign-request --endpoint-url http://127.0.0.1:{port} ls s3://{BUCKET}/"
        )
        runner.run(serve(bucket, port, latency_ms / 1000, ready))


if __name__ == "__main__":
    main()
