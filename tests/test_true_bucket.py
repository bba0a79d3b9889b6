"""A small version of the benchmarks' bucket of true size."""

import asyncio
import hashlib
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from email.message import Message
from itertools import product, takewhile
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.true_bins import (
    IN_GROUPS,
    LINKED,
    PADDED,
    QUANTITY_COUNTS,
    UNPADDED,
    TrueBins,
    make_bins,
)
from benchmarks.true_bucket import BUCKET, Bucket, serving_true_bucket
from stages import fetch, index, subset
from stages.collecting.bucket import open_bucket
from stages.collecting.listing import list_objects
from stages.collecting.reading import Reader
from stages.collecting.records import parse_record
from stages.runtime import params
from tests.conftest import REPOSITORY, bucket_params, sibling_pairs, write_params
from tools.s3 import answers, free_port

pytestmark = pytest.mark.slow

# Includes 11 un-padded ids: in S3's order, 10 and 11 come before 2.
BINS = 5000
LATENCY_MS = 60
COMMAND = [sys.executable, "-m", "benchmarks.true_bucket"]


@pytest.fixture(scope="module")
def bins() -> TrueBins:
    return make_bins(BINS)


@pytest.fixture(scope="module")
def bucket(bins: TrueBins) -> Bucket:
    """The bucket in this process, for tests without a connection."""
    return Bucket(bins)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving_true_bucket(BINS) as server:
        yield server


@pytest.fixture(scope="module")
def slow_url() -> Iterator[str]:
    with serving_true_bucket(10, LATENCY_MS) as server:
        yield server


@pytest.fixture(scope="module")
def real(abid: Path) -> TrueBins:
    """The whole bucket, based on real bins."""
    return make_bins(abid=abid)


@pytest.fixture(scope="module")
def synthetic_instead(tmp_path_factory: pytest.TempPathFactory) -> TrueBins:
    """The whole bucket, based on synthetic bins."""
    return make_bins(abid=tmp_path_factory.mktemp("without") / "abid")


@pytest.fixture(params=["real", "synthetic_instead"])
def whole(request: pytest.FixtureRequest) -> TrueBins:
    bins: TrueBins = request.getfixturevalue(request.param)
    return bins


def at(endpoint: str) -> params.Bucket:
    return params.Bucket(
        url=f"s3://{BUCKET}", region="us-east-1", endpoint=endpoint, anonymous=True
    )


def ask(url: str, path: str, method: str = "GET", **headers: str) -> tuple[int, Message, bytes]:
    """Status, headers and body."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def get(key: str, *headers: str) -> bytes:
    """A request for an object, as bytes."""
    lines = [f"GET /{BUCKET}/{key} HTTP/1.1", "Host: bucket", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def read_bodies(connection: socket.socket, count: int) -> list[bytes]:
    """The bodies of the next `count` answers."""
    bodies = []
    with connection.makefile("rb") as stream:
        for _ in range(count):
            head = b"".join(takewhile(lambda line: line != b"\r\n", stream)).decode()
            size = re.search(r"(?i)content-length: (\d+)", head)
            assert size is not None
            bodies.append(stream.read(int(size[1])))
    return bodies


def read_to_the_end(connection: socket.socket) -> bytes:
    answer = b""
    # This happens if a server closes a connection with unread data.
    with suppress(ConnectionResetError):
        while data := connection.recv(65_536):
            answer += data
    return answer


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def keys_of(bins: TrueBins) -> list[str]:
    photographs = [f"bin-images/{bin_id}.jpg" for bin_id in bins.rows]
    return sorted([*photographs, *(f"metadata/{bin_id}.json" for bin_id in bins.rows)])


def list_page(bucket: Bucket, **query: str | int) -> str:
    options = [f"{name.replace('_', '-')}={value}" for name, value in query.items()]
    answer = bucket.answer("GET", f"/{BUCKET}?{'&'.join(['list-type=2', *options])}", b"")
    assert answer.head.startswith(b"HTTP/1.1 200 ")
    return b"".join(answer.body).decode()


def list_pages(bucket: Bucket, **query: str | int) -> Iterator[list[str]]:
    """The keys and common prefixes of each page."""
    token: dict[str, str] = {}
    while True:
        page = list_page(bucket, **query, **token)
        names = re.findall("<Key>(.*?)</Key>|<CommonPrefixes><Prefix>(.*?)</Prefix>", page)
        yield [key or common for key, common in names]
        assert f"<KeyCount>{len(names)}</KeyCount>" in page
        following = re.search("<NextContinuationToken>(.*?)</NextContinuationToken>", page)
        assert ("<IsTruncated>true</IsTruncated>" in page) == (following is not None)
        if following is None:
            return
        token = {"continuation_token": following[1]}


def rolled_up(keys: Sequence[str], prefix: str, delimiter: str, start_after: str) -> list[str]:
    """The listing of these keys according to S3's documentation."""
    wanted = [key for key in keys if key.startswith(prefix) and key > start_after]
    if delimiter:
        rests = [key.removeprefix(prefix).partition(delimiter) for key in wanted]
        wanted = [prefix + name + found for name, found, _ in rests]
    return list(dict.fromkeys(wanted))


def test_every_listed_object_is_the_one_that_can_be_read(url: str, bins: TrueBins) -> None:
    store = open_bucket(at(url))
    listing = list_objects(store, "metadata/").to_pylist()
    listing += list_objects(store, "bin-images/").to_pylist()[::50]
    for row in listing:
        data = asyncio.run(Reader(store).read(row["key"], row["size"], row["etag"]))
        assert (len(data), md5(data)) == (row["size"], row["etag"])
    records = [row["key"] for row in listing if row["key"].startswith("metadata/")]
    assert records == [key for key in keys_of(bins) if key.startswith("metadata/")]


def test_an_id_has_the_same_bytes_in_other_processes_and_in_smaller_buckets(
    url: str, bins: TrueBins
) -> None:
    smaller = make_bins(BINS // 2)
    assert len(smaller.rows) < len(bins.rows)
    for bin_id in list(smaller.rows)[::40]:
        row, other = smaller.rows[bin_id], bins.rows[bin_id]
        assert smaller.record(row) == bins.record(other)
        assert smaller.photograph(row) == bins.photograph(other)
        assert ask(url, f"/{BUCKET}/metadata/{bin_id}.json")[2] == bins.record(other)
        assert ask(url, f"/{BUCKET}/bin-images/{bin_id}.jpg")[2] == bins.photograph(other)


def test_the_whole_bucket_has_the_ids_of_the_real_one(whole: TrueBins) -> None:
    ids = list(whole.rows)
    assert len(ids) == 536_434
    assert (ids[0], ids[99_998], ids[99_999], ids[PADDED - 1]) == (
        *("00001", "99999"),
        *("100000", "535234"),
    )
    assert (ids[PADDED], ids[-1]) == ("1", "1200")


def test_unpadded_twins_are_other_bins(whole: TrueBins) -> None:
    for number in range(1, UNPADDED + 1):
        record, twin = (
            json.loads(whole.record(whole.rows[bin_id]))
            for bin_id in (str(number), f"{number:05d}")
        )
        assert record["image_fname"] == f"{number}.jpg"
        assert "image_fname" not in twin
        assert number < 1000 or not record["BIN_FCSKU_DATA"].keys() & twin["BIN_FCSKU_DATA"]


def test_quantities_are_distributed_as_published(whole: TrueBins) -> None:
    counts = np.bincount(whole.quantities[:PADDED].clip(max=6))
    # Synthetic bins have their own quantities.
    sampled = len(whole.own_records) if len(whole.own_records) < 1000 else 0
    assert np.abs(counts - QUANTITY_COUNTS).sum() <= 2 * sampled
    twins = np.bincount(whole.quantities[PADDED:].clip(max=6)) / UNPADDED
    assert twins == pytest.approx(np.array(QUANTITY_COUNTS) / PADDED, abs=0.04)
    assert whole.quantities[whole.quantities >= 6].mean() == pytest.approx(9.2, abs=0.1)


def test_the_published_counts_are_those_of_the_data_set(abid: Path) -> None:
    lines = (abid / "README.md").read_text("utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith("| quantity |"))
    counts = [int(count.replace(",", "")) for count in re.findall(r": ([0-9,]+)", line)]
    assert counts[:7] == QUANTITY_COUNTS


def test_records_have_the_quantities(whole: TrueBins) -> None:
    for row in range(0, len(whole.quantities), 250):
        record = parse_record(whole.record(row))
        assert record["quantity"] == whole.quantities[row]
        if row not in whole.own_records:
            assert sum(item["quantity"] or 0 for item in record["items"]) == record["quantity"]


def test_the_labels_are_the_quantities_of_their_ids(abid: Path, bins: TrueBins) -> None:
    labels = json.loads((abid / "labels/counting_val.json").read_bytes())
    assert all(bins.quantities[position] == quantity for position, quantity in labels)


def test_siblings_are_as_many_as_in_the_real_bucket(whole: TrueBins) -> None:
    first = 200_000
    ids = [f"{number:05d}" for number in range(first, first + 40_000)]
    pairs = sibling_pairs({bin_id: whole.record(whole.rows[bin_id]) for bin_id in ids})
    assert len(pairs) / len(ids) == pytest.approx(LINKED, abs=0.01)
    assert len({bin_id for pair in pairs for bin_id in pair}) / len(ids) == pytest.approx(
        IN_GROUPS, abs=0.01
    )
    quantities = {bin_id: whole.quantities[whole.rows[bin_id]] for bin_id in ids}
    assert all(quantities[one] != quantities[two] for one, two in pairs)
    following = dict(pairs)
    assert not any(following.get(following.get(two, "")) for two in following.values())


def test_records_and_photographs_are_as_large_as_real_ones(whole: TrueBins) -> None:
    rows = range(0, PADDED, 97)
    assert np.mean([len(whole.photograph(row)) for row in rows]) == pytest.approx(57e3, rel=0.05)
    assert np.mean([len(whole.record(row)) for row in rows]) == pytest.approx(2e3, rel=0.25)
    for photograph in whole.photographs[::50]:
        with Image.open(io.BytesIO(photograph)) as image:
            image.load()


def test_bins_at_hand_are_served_unchanged(abid: Path, real: TrueBins) -> None:
    for path in (abid / "originals-1k/metadata").glob("*.json"):
        row = real.rows[path.stem]
        assert real.record(row) == path.read_bytes()
        photograph = abid / f"originals-1k/bin-images/{path.stem}.jpg"
        assert real.photograph(row) == photograph.read_bytes()


@pytest.mark.parametrize("delimiter", ["", "/", "1", "00"])
@pytest.mark.parametrize("max_keys", [1000, 237])
def test_listings_are_those_of_s3(
    bucket: Bucket, bins: TrueBins, delimiter: str, max_keys: int
) -> None:
    keys = keys_of(bins)
    for prefix, start_after in product(
        ["", "metadata/", "metadata/1", "bin-images/00", "metadata/~", "no"],
        ["", "metadata/01", "metadata/1.json", "bin-images/00999.jpg", "~"],
    ):
        query = {"prefix": prefix, "start_after": start_after, "delimiter": delimiter}
        pages = [*list_pages(bucket, **query, max_keys=max_keys)]
        assert all(len(page) == max_keys for page in pages[:-1])
        listed = [name for page in pages for name in page]
        assert listed == rolled_up(keys, prefix, delimiter, start_after)


def test_a_page_has_no_more_than_1000_keys(bucket: Bucket) -> None:
    assert [len(page) for page in list_pages(bucket, prefix="metadata/", max_keys=5000)] == [
        *[1000] * (BINS // 1000),
        BINS % 1000 + BINS * UNPADDED // PADDED,
    ]


def test_a_page_repeats_the_request_encoded_if_asked(bucket: Bucket) -> None:
    plain = list_page(bucket, prefix="a%20%26", delimiter="/")
    assert "<Prefix>a &amp;</Prefix><Delimiter>/</Delimiter>" in plain
    encoded = list_page(bucket, prefix="a%20%26", encoding_type="url")
    assert "<Prefix>a%20%26</Prefix><EncodingType>url</EncodingType>" in encoded


@pytest.mark.usefixtures("workspace")
def test_the_first_stages_run_on_it(url: str) -> None:
    wanted = 60
    sizes = {"split.train": wanted - 20, "split.validation": 10, "split.test": 10}
    sizes["subset.bins"] = wanted
    write_params(bucket_params(at(url)) | sizes)
    index.main()
    counts = json.loads(Path("data/index.json").read_text("utf-8"))
    assert counts["indexed"] == counts["records"] == BINS + BINS * UNPADDED // PADDED
    subset.main()
    fetch.main()
    shards = [pq.read_table(path) for path in sorted(Path("data/raw").glob("*.parquet"))]
    assert sum(map(len, shards)) == wanted


def test_an_answer_is_late_but_does_not_delay_others(slow_url: str) -> None:
    path = f"/{BUCKET}/metadata/00001.json"
    start = time.monotonic()
    for _ in range(3):
        assert ask(slow_url, path)[0] == 200
    one_after_another = time.monotonic() - start
    # The timers of some event loops are a millisecond early.
    assert one_after_another >= 3 * (LATENCY_MS - 1) / 1000
    start = time.monotonic()
    with connect(slow_url) as connection:
        connection.sendall(100 * get("metadata/00001.json"))
        assert len(read_bodies(connection, 100)) == 100
    assert (LATENCY_MS - 1) / 1000 <= time.monotonic() - start < 50 * LATENCY_MS / 1000


@pytest.mark.parametrize("latency", [False, True])
def test_requests_that_arrive_together_are_answered_in_their_order(
    url: str, slow_url: str, bins: TrueBins, latency: bool
) -> None:
    ids = [f"{1 + number % 10:05d}" for number in range(200)]
    keys = [f"metadata/{bin_id}.json" for bin_id in ids]
    with connect(slow_url if latency else url) as connection:
        connection.sendall(b"".join(map(get, keys)))
        bodies = read_bodies(connection, len(keys))
    assert bodies == [bins.record(bins.rows[bin_id]) for bin_id in ids]


def test_a_request_may_come_in_pieces(url: str, bins: TrueBins) -> None:
    # The end of a request comes in one piece with half of the next one.
    requests = get("metadata/00002.json") + get("metadata/00003.json")
    pieces = [bytes([byte]) for byte in requests[:30]] + [requests[30:-40], requests[-40:]]
    with connect(url) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.005)
        bodies = read_bodies(connection, 2)
    assert bodies == [bins.record(bins.rows[bin_id]) for bin_id in ("00002", "00003")]


@pytest.mark.parametrize(
    ("wanted", "start", "stop"),
    [
        ("0-0", 0, 1),
        ("10-19", 10, 20),
        ("100-", 100, None),
        ("-7", -7, None),
        ("5-999999", 5, None),
        ("-999999", None, None),
    ],
)
def test_a_range_is_that_part_of_the_object(
    url: str, bins: TrueBins, wanted: str, start: int | None, stop: int | None
) -> None:
    photograph = bins.photograph(bins.rows["00010"])
    status, headers, body = ask(url, f"/{BUCKET}/bin-images/00010.jpg", Range=f"bytes={wanted}")
    assert status == 206
    assert body == photograph[start:stop]
    first = photograph.index(body)
    assert headers["Content-Range"] == f"bytes {first}-{first + len(body) - 1}/{len(photograph)}"


@pytest.mark.parametrize("wanted", ["-", "9-5", "0-1,5-6", "x"])
def test_anything_but_a_single_range_gives_the_whole_object(
    url: str, bins: TrueBins, wanted: str
) -> None:
    answer = ask(url, f"/{BUCKET}/metadata/00010.json", Range=f"bytes={wanted}")
    assert (answer[0], answer[2]) == (200, bins.record(bins.rows["00010"]))


def test_head_has_the_headers_of_get(url: str) -> None:
    path = f"/{BUCKET}/bin-images/00011.jpg"
    status, headers, body = ask(url, path)
    assert headers["ETag"] == f'"{md5(body)}"'
    assert headers["Last-Modified"]
    head_status, head_headers, _ = ask(url, path, "HEAD")
    assert (head_status, head_headers.items()) == (status, headers.items())
    assert int(head_headers["Content-Length"]) == len(body)
    assert ask(url, f"/{BUCKET}", "HEAD")[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "range_", "status", "code"),
    [
        ("GET", f"/{BUCKET}/metadata/05001.json", "", 404, "NoSuchKey"),
        ("GET", f"/{BUCKET}/metadata/12.json", "", 404, "NoSuchKey"),
        ("GET", f"/{BUCKET}/metadata/00001.jpg", "", 404, "NoSuchKey"),
        ("GET", f"/{BUCKET}/other/00001.json", "", 404, "NoSuchKey"),
        ("GET", f"/{BUCKET}/metadata/x/00001.json", "", 404, "NoSuchKey"),
        ("GET", "/other/metadata/00001.json", "", 404, "NoSuchBucket"),
        ("GET", "/", "", 404, "NoSuchBucket"),
        ("GET", f"/{BUCKET}/metadata/00001.json", "bytes=99999-", 416, "InvalidRange"),
        ("GET", f"/{BUCKET}/metadata/00001.json", "bytes=-0", 416, "InvalidRange"),
        ("GET", f"/{BUCKET}", "", 501, "NotImplemented"),
        ("GET", f"/{BUCKET}?list-type=2&continuation-token=x", "", 400, "InvalidArgument"),
        ("GET", f"/{BUCKET}?list-type=2&max-keys=-1", "", 400, "InvalidArgument"),
        ("PUT", f"/{BUCKET}/metadata/00001.json", "", 405, "MethodNotAllowed"),
        ("DELETE", f"/{BUCKET}/metadata/00001.json", "", 405, "MethodNotAllowed"),
    ],
)
def test_unsupported_requests_are_refused_as_s3_does(
    url: str, method: str, path: str, range_: str, status: int, code: str
) -> None:
    answer = ask(url, path, method, **({"Range": range_} if range_ else {}))
    assert answer[0] == status
    assert f"<Code>{code}</Code>".encode() in answer[2]


@pytest.mark.parametrize(("bin_id", "status"), [("00001", 200), ("none", 404)])
def test_the_answer_to_head_ends_with_its_head(url: str, bin_id: str, status: int) -> None:
    request = get(f"metadata/{bin_id}.json", "Connection: close").replace(b"GET", b"HEAD")
    with connect(url) as connection:
        connection.sendall(request)
        answer = read_to_the_end(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert body == b""


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"A" * 100_000, 400),
        (get("metadata/00001.json", "Connection: close"), 200),
        (get("metadata/00001.json").replace(b"HTTP/1.1", b"HTTP/1.0"), 200),
        (b"PUT /x HTTP/1.1\r\nContent-Length: 40\r\n\r\n" + get("metadata/00001.json"), 405),
    ],
)
def test_a_connection_ends_after_the_last_answer(url: str, request_: bytes, status: int) -> None:
    with connect(url) as connection:
        connection.sendall(request_ + b"GET ")
        answer = read_to_the_end(connection)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert answer.count(b"HTTP/1.1") == 1


def test_a_server_counts_its_requests_and_ends_with_the_block() -> None:
    with serving_true_bucket(3) as url:
        sizes = [len(ask(url, f"/{BUCKET}/metadata/0000{number}.json")[2]) for number in (1, 2)]
        sizes.append(len(ask(url, f"/{BUCKET}?list-type=2")[2]))
        sizes.append(len(ask(url, f"/{BUCKET}/metadata/00004.json")[2]))
        ask(url, f"/{BUCKET}/bin-images/00001.jpg", "HEAD")
        with connect(url) as connection:
            # Data after the head of another method belongs to its body.
            connection.sendall(b"PUT /x HTTP/1.1\r\n\r\n" + get("metadata/00001.json"))
            sizes.append(len(read_to_the_end(connection).partition(b"\r\n\r\n")[2]))
        counts = json.loads(ask(url, "/-/counts")[2])
    assert counts == {"gets": 2, "heads": 1, "lists": 1, "refused": 2, "bytes": sum(sizes)}
    assert not answers(int(url.rpartition(":")[2]))


@contextmanager
def run_by_hand(*options: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*COMMAND, *options],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def test_it_answers_on_loopback_only_and_prints_its_counts_at_the_end() -> None:
    port = free_port()
    with run_by_hand("--bins", "3", "--port", str(port)) as process:
        assert process.stdout is not None
        assert f"http://127.0.0.1:{port}" in process.stdout.readline()
        sockets = psutil.Process(process.pid).net_connections()
        assert {(one.laddr.ip, one.laddr.port) for one in sockets} == {("127.0.0.1", port)}
        ask(f"http://127.0.0.1:{port}", f"/{BUCKET}?list-type=2&max-keys=1")
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert text.splitlines()[-1].startswith("0 GETs, 0 HEADs, 1 lists, 0 refused; ")


def test_a_port_in_use_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with run_by_hand("--port", str(port)) as process:
            text, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert text == f"true_bucket: error: port {port} is in use; try another --port\n"


def test_a_server_that_does_not_start_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="did not start"), serving_true_bucket(0):
        pass
    assert "--bins must be from 1 to 535234" in capfd.readouterr().err
