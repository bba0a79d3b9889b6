"""Reading the bucket while S3, or the network before it, does what it does on bad days."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from stages import fetch, index
from stages.collecting import bucket, retries
from stages.collecting.bucket import list_objects, open_bucket
from stages.collecting.retries import FailedAttempt, Retries
from stages.formats.shards import Reject, read_rejects
from stages.runtime import params, paths
from stages.runtime.errors import UserError
from tests.conftest import S3, bucket_params, objects_of, write_params
from tests.faults import (
    SECRET,
    Fault,
    FaultProxy,
    Plan,
    always,
    at_random,
    fault_proxy,
    no_faults,
    outage,
)
from tests.test_fetch import expected, fetched, prepare
from tools.drawing import DrawnBin
from tools.s3 import free_port, serving

OF_LISTINGS = [fault for fault in Fault if fault not in {Fault.NOT_FOUND, Fault.CHANGED}]
OUTAGES = [
    (index, Fault.SLOW_DOWN, "everything"),
    (index, Fault.STALL, "objects"),
    (fetch, Fault.RESET, "everything"),
    (fetch, Fault.SLOW_DOWN, "objects"),
]
REASONS = {
    Fault.INTERNAL_ERROR: "server error 500, time and again",
    Fault.SLOW_DOWN: "server error 503, time and again",
    Fault.RESET: "reset, time and again",
    Fault.STALL: "time-out, time and again",
    Fault.CUT: "cut body, time and again",
    Fault.SHORT: r"has \d+ bytes, \d+ are listed",
    Fault.GARBLED: r"content has the MD5 \w{32}, its etag is \w{32}: damaged, or .*",
    Fault.NOT_FOUND: "not found",
    Fault.DENIED: "access denied",
    Fault.CHANGED: "changed since it was listed: run `dvc repro --force index`",
}
KINDS = {
    Fault.INTERNAL_ERROR: "server error",
    Fault.SLOW_DOWN: "server error",
    Fault.RESET: "reset",
    Fault.STALL: "time-out",
    Fault.CUT: "cut body",
    Fault.SHORT: "cut body",
    Fault.GARBLED: "damaged body",
    Fault.NOT_FOUND: "not found",
    Fault.DENIED: "access denied",
    Fault.CHANGED: "changed object",
}


@pytest.fixture(scope="session")
def bins(s3: S3, drawn: list[DrawnBin]) -> params.Bucket:
    """The drawn bins, undisturbed."""
    return s3.make_bucket(objects_of(drawn))


@pytest.fixture
def proxy(s3: S3) -> Iterator[FaultProxy]:
    with fault_proxy(s3.url) as proxy:
        yield proxy


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All waits are a tenth, or shorter."""
    monkeypatch.setattr(bucket, "STALL_TIMEOUT", 0.5)
    monkeypatch.setattr(bucket, "DEADLINE", 3.5)
    monkeypatch.setattr(bucket, "PROBE_SECONDS", 0.5)
    monkeypatch.setattr(retries, "_LONGEST_WAIT", 0.2)


@pytest.fixture
def soon_given_up(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    """What fails always fails after a second."""
    monkeypatch.setattr(bucket, "DEADLINE", 1.0)


def behind(proxy: FaultProxy, source: params.Bucket) -> params.Bucket:
    return source.model_copy(update={"endpoint": proxy.url})


def run_stages(source: params.Bucket, drawn: list[DrawnBin], plan: Plan, proxy: FaultProxy) -> str:
    """Index and fetch through the proxy; what both say at their end."""
    prepare(source, drawn, shard_bins=50)
    write_params({**bucket_params(behind(proxy, source)), "fetch.shard_bins": 50})
    proxy.plan = plan
    return f"{index.main()}\n{fetch.main()}"


def outputs() -> dict[str, bytes]:
    return {
        path.as_posix(): path.read_bytes() for path in Path("data").rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(
    s3: S3, bins: params.Bucket, drawn: list[DrawnBin], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, bytes]]:
    """What index and fetch say, and the files they write, without faults."""
    with pytest.MonkeyPatch.context() as patch, fault_proxy(s3.url) as proxy:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        return run_stages(bins, drawn, no_faults, proxy), outputs()


@pytest.mark.usefixtures("workspace", "impatient")
@pytest.mark.parametrize("seed", range(2))
def test_one_fault_of_any_kind_in_ten_requests_changes_no_byte(
    bins: params.Bucket,
    drawn: list[DrawnBin],
    proxy: FaultProxy,
    undisturbed: tuple[str, dict[str, bytes]],
    seed: int,
) -> None:
    start = time.monotonic()
    said = run_stages(bins, drawn, at_random(list(Fault), 0.1, seed), proxy)
    assert time.monotonic() - start < 20
    assert outputs() == undisturbed[1]
    assert re.sub("; retried .*", "", said) == undisturbed[0]
    # An answer that is late is no failure.
    failures = proxy.injected.total() - proxy.injected[Fault.LATENCY]
    assert sum(map(int, re.findall(r"; retried (\d+): ", said))) >= failures > 10
    assert SECRET not in said


@pytest.mark.usefixtures("workspace", "impatient")
@pytest.mark.parametrize("fault", [*KINDS, Fault.LATENCY], ids=lambda fault: fault.name.lower())
def test_one_such_fault_in_ten_requests_changes_no_byte(
    bins: params.Bucket,
    drawn: list[DrawnBin],
    proxy: FaultProxy,
    undisturbed: tuple[str, dict[str, bytes]],
    fault: Fault,
) -> None:
    said = run_stages(bins, drawn, at_random([fault], 0.1, seed=0), proxy)
    assert outputs() == undisturbed[1]
    assert proxy.injected[fault] > 10
    assert KINDS.get(fault, "") in said


@pytest.fixture(scope="module")
def long_listing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[params.Bucket]:
    """2,500 keys that no range divides, so that a listing goes on from page to page."""
    folder = tmp_path_factory.mktemp("listing") / "buckets"
    (folder / "bins/metadata").mkdir(parents=True)
    for number in range(2500):
        (folder / f"bins/metadata/bin-{number:04d}.json").write_bytes(b"{}")
    with serving(folder) as url:
        yield params.Bucket(url="s3://bins", region="us-east-1", endpoint=url, anonymous=True)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", OF_LISTINGS, ids=lambda fault: fault.name.lower())
def test_a_listing_that_breaks_off_goes_on_after_its_last_key(
    long_listing: params.Bucket, fault: Fault
) -> None:
    whole = list_objects(open_bucket(long_listing), "metadata/")
    assert len(whole) == 2500
    counted = Retries()
    with fault_proxy(str(long_listing.endpoint)) as proxy:
        # Every page after the first fails once, or each token is expired by its next use.
        proxy.plan = lambda request: (
            fault if request.continues or request.number in {1, 4} else None
        )
        found = list_objects(open_bucket(behind(proxy, long_listing)), "metadata/", counted)
        assert found.equals(whole)
        assert proxy.requests.total() < 12
    assert (fault is Fault.LATENCY) == (counted.summary() == "")


@pytest.mark.usefixtures("workspace", "soon_given_up")
@pytest.mark.parametrize("fault", KINDS, ids=lambda fault: fault.name.lower())
def test_a_permanent_fault_of_one_photograph_costs_that_one_only(
    bins: params.Bucket, drawn: list[DrawnBin], proxy: FaultProxy, fault: Fault
) -> None:
    prepare(behind(proxy, bins), drawn, shard_bins=50, max_rejects=0.01)
    proxy.plan = always(fault, "00007.jpg")
    proxy.take_requests()
    fetch.main()
    (reject,) = read_rejects(paths.UNFETCHED)
    assert reject.id == "00007"
    assert re.fullmatch(REASONS[fault], reject.reason)
    assert sum(fetched(), []) == expected([one for one in drawn if one.id != "00007"])  # noqa: RUF017
    # A stalled answer takes most of the time that there is.
    assert 2 <= proxy.take_requests()["00007.jpg"] <= 40


@pytest.mark.usefixtures("workspace", "soon_given_up")
@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.GARBLED])
def test_a_permanent_fault_of_one_record_costs_that_one_only(
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
def test_an_only_object_that_fails_is_no_outage(
    bins: params.Bucket, drawn: list[DrawnBin], proxy: FaultProxy
) -> None:
    prepare(behind(proxy, bins), drawn[:1], max_rejects=1.0)
    proxy.plan = outage(Fault.SLOW_DOWN, after=0, lists=False)
    fetch.main()
    assert read_rejects(paths.UNFETCHED) == [
        Reject(drawn[0].id, "server error 503, time and again")
    ]


@pytest.mark.usefixtures("workspace", "soon_given_up")
@pytest.mark.parametrize(
    ("stage", "fault", "what"),
    OUTAGES,
    ids=[f"{stage.__name__} {fault.name} {what}" for stage, fault, what in OUTAGES],
)
def test_after_an_outage_the_next_run_reads_only_what_is_missing(
    bins: params.Bucket,
    drawn: list[DrawnBin],
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    stage: ModuleType,
    fault: Fault,
    what: str,
) -> None:
    monkeypatch.setattr(index, "PART_RECORDS", 10)
    monkeypatch.setattr(stage, "IN_FLIGHT", 4)
    # Though every object might be rejected, an outage rejects none.
    prepare(behind(proxy, bins), drawn, shard_bins=10, max_rejects=1.0)
    stage.main()
    undisturbed = outputs()
    proxy.take_requests()
    proxy.plan = outage(fault, after=65, lists=what == "everything")
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        stage.main()
    assert time.monotonic() - start < 10
    message = str(caught.value)
    assert f"{bins.url} at {proxy.url} cannot be read" in message
    assert "the next run goes on where this one stopped" in message
    assert SECRET not in message
    assert outputs() == undisturbed
    proxy.plan = no_faults
    proxy.take_requests()
    stage.main()
    missing = proxy.take_requests()
    assert outputs() == undisturbed
    # At least five shards were whole, in the order of the ids.
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
    bins: params.Bucket, drawn: list[DrawnBin], stage: ModuleType
) -> None:
    prepare(bins, drawn)
    gone = f"http://127.0.0.1:{free_port()}"
    write_params(bucket_params(bins.model_copy(update={"endpoint": gone})))
    with pytest.raises(UserError, match=f"{bins.url} at {gone} cannot be read"):
        stage.main()


def test_an_outage_is_known_within_a_minute() -> None:
    # The last attempt, the probe and its last attempt, and what other readers have under way.
    stalled = 3 * bucket.STALL_TIMEOUT
    assert retries.DEADLINE + bucket.PROBE_SECONDS + stalled < 60


def test_waits_grow_and_have_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def fail() -> None:
        raise FailedAttempt("server error", "server error 503", definite=True)

    monkeypatch.setattr("asyncio.sleep", sleep)
    for _ in range(200):
        with pytest.raises(FailedAttempt):
            asyncio.run(Retries().run(fail, seconds=1000))
    by_attempt = [waits[place :: retries.ATTEMPTS - 1] for place in range(retries.ATTEMPTS - 1)]
    for number, some in enumerate(by_attempt):
        longest = 0.05 * 2**number
        assert 0.8 * longest < max(some) <= longest
        assert min(some) < 0.2 * longest


def test_the_summary_counts_by_kind() -> None:
    counted = Retries()
    answers = iter(["reset", "server error", "server error", ""])

    async def attempt() -> None:
        if kind := next(answers):
            raise FailedAttempt(kind, kind, definite=False)

    asyncio.run(counted.run(attempt, seconds=10))
    assert counted.summary() == "; retried 3: 2 x server error, 1 x reset"
    assert Retries().summary() == ""
