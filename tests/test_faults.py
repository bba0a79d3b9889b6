"""Reading the bucket while S3, the network or this machine fails in its usual ways."""

import errno
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from urllib.parse import parse_qs, urlsplit

import obstore
import pytest
from obstore.exceptions import GenericError

from stages import fetch, index
from stages.collecting import advice, bucket, reading
from stages.collecting.bucket import open_bucket
from stages.collecting.listing import list_objects
from stages.formats.shards import Reject, read_rejects
from stages.runtime import params, paths
from stages.runtime.errors import UserError
from tests.conftest import (
    REPOSITORY,
    S3,
    bucket_params,
    folder_bucket,
    objects_of,
    write_params,
)
from tests.faults import (
    BELIEVED,
    DAMAGES,
    SECRET,
    Fault,
    FaultProxy,
    Plan,
    always,
    at_random,
    fault_proxy,
    no_faults,
    outage,
    passing,
)
from tests.test_fetch import expected, fetched, prepare
from tools.s3 import free_port, serving
from tools.synthetic import SyntheticBin

# Faults that another attempt may overcome. Refusals are final.
PASSING: list[Fault] = [fault for fault in Fault if fault not in BELIEVED]
OF_LISTINGS: list[Fault] = [fault for fault in PASSING if fault is not Fault.CHANGED]
OUTAGES = [
    (index, Fault.SLOW_DOWN, "everything"),
    (index, Fault.STALL, "objects"),
    (fetch, Fault.RESET, "everything"),
    (fetch, Fault.SLOW_DOWN, "objects"),
]
REASONS = {
    Fault.INTERNAL_ERROR: "server error 500, repeatedly",
    Fault.SLOW_DOWN: "server error 503, repeatedly",
    Fault.RESET: "network error, repeatedly",
    Fault.STALL: "network error, repeatedly",
    Fault.CUT: "network error, repeatedly",
    Fault.SHORT: r"has \d+ bytes, \d+ are listed",
    Fault.GARBLED: r"content has the MD5 \w{32}, its etag is \w{32}: damaged, or .*",
    Fault.NOT_FOUND: "not found",
    Fault.DENIED: "access denied",
    Fault.CHANGED: "changed since it was listed: run `dvc repro --force index`",
}
KINDS = {
    Fault.INTERNAL_ERROR: "server error 500",
    Fault.SLOW_DOWN: "server error 503",
    Fault.RESET: "network error",
    Fault.STALL: "network error",
    Fault.CUT: "network error",
    Fault.SHORT: "cut body",
    Fault.GARBLED: "damaged body",
    Fault.CHANGED: "changed object",
}


@pytest.fixture(scope="session")
def bins(s3: S3, synthetic: list[SyntheticBin]) -> params.Bucket:
    """A bucket of synthetic bins, without faults."""
    return s3.make_bucket(objects_of(synthetic))


@pytest.fixture
def proxy(s3: S3) -> Iterator[FaultProxy]:
    with fault_proxy(s3.url) as proxy:
        yield proxy


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten all waits to a tenth or less."""
    monkeypatch.setattr(bucket, "STALL_TIMEOUT", 0.5)
    monkeypatch.setattr(reading, "DEADLINE", 3.5)
    monkeypatch.setattr(reading, "PROBE_SECONDS", 0.5)
    monkeypatch.setattr(reading, "LONGEST_WAIT", 0.2)


@pytest.fixture
def soon_given_up(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    """Give up after a second."""
    monkeypatch.setattr(reading, "DEADLINE", 1.0)


def behind(proxy: FaultProxy, source: params.Bucket) -> params.Bucket:
    return source.model_copy(update={"endpoint": proxy.url})


def run_stages(
    source: params.Bucket, synthetic: list[SyntheticBin], plan: Plan, proxy: FaultProxy
) -> str:
    """Index and fetch through the proxy. Returns the last lines of both."""
    prepare(source, synthetic, shard_bins=50)
    write_params({**bucket_params(behind(proxy, source)), "fetch.shard_bins": 50})
    proxy.plan = plan
    return f"{index.main()}\n{fetch.main()}"


def outputs() -> dict[str, bytes]:
    return {
        path.as_posix(): path.read_bytes() for path in Path("data").rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(
    s3: S3,
    bins: params.Bucket,
    synthetic: list[SyntheticBin],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, dict[str, bytes]]:
    """The last lines and the outputs of index and fetch without faults."""
    with pytest.MonkeyPatch.context() as patch, fault_proxy(s3.url) as proxy:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        return run_stages(bins, synthetic, no_faults, proxy), outputs()


@pytest.mark.usefixtures("workspace", "impatient")
def test_one_fault_of_any_kind_in_ten_requests_changes_no_byte(
    bins: params.Bucket,
    synthetic: list[SyntheticBin],
    proxy: FaultProxy,
    undisturbed: tuple[str, dict[str, bytes]],
) -> None:
    text = run_stages(bins, synthetic, passing(0.1, seed=0), proxy)
    assert outputs() == undisturbed[1]
    assert re.sub("; retried .*", "", text) == undisturbed[0]
    # A late answer is not a failure, and the HTTP client itself may retry after a reset.
    uncounted = proxy.injected[Fault.LATENCY] + proxy.injected[Fault.RESET]
    failures = proxy.injected.total() - uncounted
    assert sum(map(int, re.findall(r"; retried (\d+): ", text))) >= failures > 5
    assert SECRET not in text


@pytest.mark.usefixtures("workspace", "impatient")
@pytest.mark.parametrize("fault", [*KINDS, Fault.LATENCY], ids=lambda fault: fault.name.lower())
def test_one_such_fault_in_ten_requests_changes_no_byte(
    bins: params.Bucket,
    synthetic: list[SyntheticBin],
    proxy: FaultProxy,
    undisturbed: tuple[str, dict[str, bytes]],
    fault: Fault,
) -> None:
    plan = at_random([fault], 0.1, seed=0)
    if fault in DAMAGES:
        text = run_stages(bins, synthetic, lambda it: plan(it) if it.number == 1 else None, proxy)
    else:
        text = run_stages(bins, synthetic, plan, proxy)
    assert outputs() == undisturbed[1]
    assert proxy.injected[fault] > 10
    assert KINDS.get(fault, "") in text


@pytest.fixture(scope="module")
def long_listing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[params.Bucket]:
    """2,500 keys that no range divides, so that a listing continues from page to page."""
    folder = tmp_path_factory.mktemp("listing") / "buckets"
    (folder / "bins/metadata").mkdir(parents=True)
    for number in range(2500):
        (folder / f"bins/metadata/bin-{number:04d}.json").write_bytes(b"{}")
    with serving(folder) as url:
        yield params.Bucket(url="s3://bins", region="us-east-1", endpoint=url, anonymous=True)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", OF_LISTINGS, ids=lambda fault: fault.name.lower())
def test_an_interrupted_listing_resumes_after_its_last_key(
    long_listing: params.Bucket, fault: Fault
) -> None:
    whole = list_objects(open_bucket(long_listing), "metadata/")
    assert len(whole) == 2500
    retried = Counter[str]()
    with fault_proxy(str(long_listing.endpoint)) as proxy:
        # Every page after the first fails once, or each token has expired by its next use.
        proxy.plan = lambda request: (
            fault
            if request.continues or (request.number in {1, 4} and fault is not Fault.EXPIRED)
            else None
        )
        found = list_objects(open_bucket(behind(proxy, long_listing)), "metadata/", retried)
        assert found.equals(whole)
        assert proxy.requests.total() < 12
    assert (fault is Fault.LATENCY) == (not retried)


@pytest.mark.usefixtures("workspace", "soon_given_up")
@pytest.mark.parametrize("fault", REASONS, ids=lambda fault: fault.name.lower())
def test_a_permanent_fault_of_one_photograph_costs_only_that_one(
    bins: params.Bucket, synthetic: list[SyntheticBin], proxy: FaultProxy, fault: Fault
) -> None:
    prepare(behind(proxy, bins), synthetic, shard_bins=50, max_rejects=0.01)
    proxy.plan = always(fault, "00007.jpg")
    proxy.take_requests()
    fetch.main()
    (reject,) = read_rejects(paths.UNFETCHED)
    assert reject.id == "00007"
    assert re.fullmatch(REASONS[fault], reject.reason)
    assert sum(fetched(), []) == expected([one for one in synthetic if one.id != "00007"])  # noqa: RUF017
    # A stalled answer takes most of the available time.
    asked = proxy.take_requests()["00007.jpg"]
    assert asked == 1 if fault in {Fault.NOT_FOUND, Fault.DENIED} else 2 <= asked <= 40


@pytest.mark.usefixtures("workspace", "soon_given_up")
@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.GARBLED])
def test_a_permanent_fault_of_one_record_costs_only_that_one(
    bins: params.Bucket, proxy: FaultProxy, fault: Fault
) -> None:
    write_params({**bucket_params(behind(proxy, bins)), "index.max_rejects": 0.01})
    proxy.plan = always(fault, "00007.json")
    index.main()
    counts = json.loads(Path("data/index.json").read_text("utf-8"))
    assert (counts["indexed"], counts["rejected"]) == (120, {"unreadable": 1})
    (example,) = counts["examples"]
    assert re.fullmatch(f"unreadable: {REASONS[fault]}", example["reason"])


@pytest.mark.usefixtures("workspace", "soon_given_up")
def test_the_failure_of_an_only_object_is_not_an_outage(
    bins: params.Bucket, synthetic: list[SyntheticBin], proxy: FaultProxy
) -> None:
    prepare(behind(proxy, bins), synthetic[:1], max_rejects=1.0)
    proxy.plan = outage(Fault.SLOW_DOWN, after=0, lists=False)
    fetch.main()
    assert read_rejects(paths.UNFETCHED) == [
        Reject(synthetic[0].id, "server error 503, repeatedly")
    ]


@pytest.mark.usefixtures("workspace", "soon_given_up")
@pytest.mark.parametrize(
    ("stage", "fault", "what"),
    OUTAGES,
    ids=[f"{stage.__name__} {fault.name} {what}" for stage, fault, what in OUTAGES],
)
def test_after_an_outage_the_next_run_reads_only_what_is_missing(
    bins: params.Bucket,
    synthetic: list[SyntheticBin],
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    stage: ModuleType,
    fault: Fault,
    what: str,
) -> None:
    monkeypatch.setattr(index, "PART_RECORDS", 10)
    monkeypatch.setattr(index, "PARTS_AT_ONCE", 1)
    monkeypatch.setattr(fetch, "SHARDS_AT_ONCE", 1)
    # Although every object may be rejected, an outage rejects none.
    prepare(behind(proxy, bins), synthetic, shard_bins=10, max_rejects=1.0)
    stage.main()
    undisturbed = outputs()
    proxy.take_requests()
    proxy.plan = outage(fault, after=65, lists=what == "everything")
    with pytest.raises(UserError) as caught:
        stage.main()
    message = str(caught.value)
    assert f"{bins.url} at {proxy.url} cannot be read" in message
    assert "the next run continues where this one stopped" in message
    assert SECRET not in message
    assert outputs() == undisturbed
    proxy.plan = no_faults
    proxy.take_requests()
    stage.main()
    missing = proxy.take_requests()
    assert outputs() == undisturbed
    # At least five shards, in the order of the ids, had been finished.
    names = sorted(Path(key).name for key in listed_keys(stage, bins))
    assert sorted(missing) == names[-len(missing) :]
    assert len(missing) in {61, 71}
    assert set(missing.values()) == {1}


def listed_keys(stage: ModuleType, source: params.Bucket) -> list[str]:
    prefix = bucket.RECORDS if stage is index else bucket.PHOTOGRAPHS
    keys: list[str] = list_objects(open_bucket(source), prefix)["key"].to_pylist()
    return keys


@pytest.mark.usefixtures("workspace", "soon_given_up")
@pytest.mark.parametrize("stage", [index, fetch], ids=["index", "fetch"])
def test_a_server_that_is_gone_is_named(
    bins: params.Bucket, synthetic: list[SyntheticBin], stage: ModuleType
) -> None:
    prepare(bins, synthetic)
    gone = f"http://127.0.0.1:{free_port()}"
    write_params(bucket_params(bins.model_copy(update={"endpoint": gone})))
    with pytest.raises(UserError, match=f"{bins.url} at {gone} cannot be read"):
        stage.main()


def test_an_outage_is_known_within_a_minute() -> None:
    # The last attempt, the probe, and the requests of other readers.
    stalled = 3 * bucket.STALL_TIMEOUT
    assert reading.DEADLINE + reading.PROBE_SECONDS + stalled < 60


@pytest.mark.usefixtures("workspace", "soon_given_up")
@pytest.mark.parametrize("fault", [Fault.EXPIRED, Fault.DENIED, Fault.NOT_FOUND])
@pytest.mark.parametrize("stage", [index, fetch], ids=["index", "fetch"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_store_that_begins_to_refuse_stops_the_stage(
    bins: params.Bucket,
    synthetic: list[SyntheticBin],
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    stage: ModuleType,
    fault: Fault,
    resumed: bool,
) -> None:
    """Credentials expire, or a bucket is removed, before the last few objects are read."""
    monkeypatch.setattr(index, "PART_RECORDS", 20)
    monkeypatch.setattr(index, "PARTS_AT_ONCE", 1)
    monkeypatch.setattr(fetch, "SHARDS_AT_ONCE", 1)
    prepare(behind(proxy, bins), synthetic, shard_bins=20, max_rejects=1.0)
    refused = set(sorted(one.id for one in synthetic)[-4:])
    for _ in range(2 if resumed else 1):
        # When the last four objects are requested, all others are refused too.
        begun: list[bool] = []

        def plan(request: object, begun: list[bool] = begun) -> Fault | None:
            key = str(getattr(request, "key", ""))
            if Path(key).stem in refused:
                begun.append(True)
            return fault if begun and not key.endswith("?list") else None

        proxy.plan = plan
        with pytest.raises(UserError, match=r"no longer gives .*credentials expired") as caught:
            stage.main()
    assert SECRET not in str(caught.value)
    assert not paths.RAW.exists()
    assert not paths.INDEX.exists()
    proxy.plan = no_faults
    proxy.take_requests()
    stage.main()
    # The finished shards were kept.
    assert len(proxy.take_requests()) <= 21


@pytest.mark.usefixtures("workspace")
def test_a_folder_that_is_moved_away_stops_the_stage(
    tmp_path: Path, synthetic: list[SyntheticBin], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_bucket(tmp_path / "bucket", objects_of(synthetic))
    prepare(source, synthetic, shard_bins=20, max_rejects=1.0)
    read = reading.Reader.read

    async def read_and_move(reader: reading.Reader, key: str, size: int, etag: str | None) -> bytes:
        if key.endswith("00050.jpg"):
            (tmp_path / "bucket").rename(tmp_path / "moved")
        return await read(reader, key, size, etag)

    monkeypatch.setattr(reading.Reader, "read", read_and_move)
    with pytest.raises(UserError, match="no longer gives"):
        fetch.main()


def fail_once_with(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let obstore fail with an error of this machine, in its own words, at the tenth object."""
    get, calls = obstore.get_async, Counter[str]()

    async def get_async(store: object, key: str) -> object:
        calls["all"] += 1
        if calls["all"] == 10:
            text = f"Generic LocalFileSystem error: {os.strerror(number)} (os error {number})"
            raise GenericError(text)
        return await get(store, key)  # type: ignore[arg-type]

    monkeypatch.setattr(obstore, "get_async", get_async)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("stage", [index, fetch], ids=["index", "fetch"])
@pytest.mark.parametrize(
    "number",
    [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ENOTCONN],
    ids=errno.errorcode.get,
)
def test_an_error_of_this_machine_stops_the_stage(
    tmp_path: Path,
    synthetic: list[SyntheticBin],
    monkeypatch: pytest.MonkeyPatch,
    stage: ModuleType,
    number: int,
) -> None:
    prepare(folder_bucket(tmp_path / "bucket", objects_of(synthetic)), synthetic, max_rejects=1.0)
    fail_once_with(number, monkeypatch)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
        stage.main()
    assert caught.value.errno == number


@pytest.mark.slow
@pytest.mark.usefixtures("workspace")
def test_a_low_limit_of_open_files_loses_no_bin(abid: Path) -> None:
    """macOS allows 256 open files by default; `ulimit -n` sets the hard limit too."""
    source = params.Bucket(
        url=(abid / "resized-10k").resolve().as_uri(),
        region="us-east-1",
        endpoint=None,
        anonymous=True,
    )
    sizes = {"subset.bins": 6620, "split.train": 5362, "split.validation": 596, "split.test": 662}
    write_params({**bucket_params(source), **sizes})
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    for stage, text in {
        "index": "index: 10000 bins; records rejected: 0",
        "subset": "subset: 6620 bins in random order",
        "fetch": "fetch: 6620 photographs; 0 could not be fetched",
    }.items():
        command = f"ulimit -n 256 && exec {sys.executable} -m stages.{stage}"
        done = subprocess.run(
            ["bash", "-c", command], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout[: len(text)]) == (0, text), done.stderr


# How servers list keys, given all keys and the one to start after.
Listing = Callable[[list[str], str], list[str]]


def strict(keys: list[str], start: str) -> list[str]:
    return [key for key in keys if key > start]


def with_the_key_itself(keys: list[str], start: str) -> list[str]:
    return [key for key in keys if key >= start]


def ignoring_it(keys: list[str], _start: str) -> list[str]:
    return keys


def unsorted(keys: list[str], start: str) -> list[str]:
    return strict(keys[::2] + keys[1::2], start)


@pytest.mark.parametrize("listing", [strict, with_the_key_itself, ignoring_it, unsorted])
def test_every_server_lists_each_object_once(listing: Listing) -> None:
    keys = [f"metadata/{number:05d}.json" for number in range(1, 99_999, 40)]
    with listing_server(keys, listing) as (source, requests):
        found = list_objects(open_bucket(source), "metadata/")
    assert found["key"].to_pylist() == keys
    assert len(requests) < 300


def test_an_endless_listing_is_named() -> None:
    keys = [f"metadata/{number:05d}.json" for number in range(2500)]
    with (
        listing_server(keys, ignoring_it, endless=True) as (source, requests),
        pytest.raises(UserError, match="lists the same objects over and over"),
        advice.explained(source),
    ):
        list_objects(open_bucket(source), "metadata/")
    assert len(requests) < 300


@contextmanager
def listing_server(
    keys: list[str], listing: Listing, *, endless: bool = False
) -> Iterator[tuple[params.Bucket, list[str]]]:
    """A bucket on a server with this listing, and the requests that it receives."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            query = parse_qs(urlsplit(self.path).query)
            token = int(query.get("continuation-token", ["0"])[0])
            found = listing(keys, query.get("start-after", [""])[0])
            page = found[token : token + 1000]
            following = token + 1000 if token + 1000 < len(found) else 0
            more = endless or bool(following)
            body = "".join(
                f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00Z</LastModified>"
                '<ETag>"x"</ETag><Size>2</Size></Contents>'
                for key in page
            )
            body += f"<IsTruncated>{str(more).lower()}</IsTruncated>"
            if more:
                body += f"<NextContinuationToken>{following}</NextContinuationToken>"
            data = f"<ListBucketResult>{body}</ListBucketResult>".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        # All ranges are requested at once, and wait here instead of being refused.
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        yield (
            params.Bucket(url="s3://bins", region="us-east-1", endpoint=url, anonymous=True),
            requests,
        )
        server.shutdown()
        thread.join()
