import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.formats.shards import Reject, Row, shard_name, shard_paths
from stages.runtime.errors import UserError
from stages.sharding import building
from stages.sharding.building import (
    BuiltShard,
    RejectLimit,
    Shard,
    build_shards,
    built_shard,
    plan_shards,
)
from stages.sharding.executors import executor

Work = Callable[[int], Row | Reject]
SCHEMA = pa.schema([("id", pa.string())])
NO_LIMIT = RejectLimit("fetch.max_rejects", 1.0)


class StopError(Exception):
    """Raised to interrupt the work."""


def shards_of(total: int, size: int) -> list[Shard]:
    numbers = [range(start, min(start + size, total)) for start in range(0, total, size)]
    return [Shard(shard_name(position), len(some), some) for position, some in enumerate(numbers)]


def build(
    folder: Path, shards: list[Shard], work: Work, limit: RejectLimit = NO_LIMIT
) -> tuple[list[list[str]], list[Reject]]:
    """Build the shards. Returns the ids in each, and the rejects."""

    async def make(shard: Shard, advance: Callable[[int], object]) -> BuiltShard:
        results = [work(number) for number in shard.source]
        advance(len(results))
        return built_shard(results, SCHEMA)

    done, rejects, _ = build_shards(
        make, folder, shards, limit, unit="", executor=executor("local", at_once=1)
    )
    return [pq.read_table(path)["id"].to_pylist() for path in shard_paths(done)], rejects


def keep(number: int) -> Row:
    return {"id": str(number)}


def reject_multiples(divisor: int, number: int) -> Row | Reject:
    return keep(number) if number % divisor else Reject(str(number), f"divides by {divisor}")


def fail_at(stop: int, number: int) -> Row | Reject:
    if number == stop:
        raise StopError
    return reject_multiples(3, number)


def test_shards_hold_the_items_in_order(tmp_path: Path) -> None:
    ids, rejects = build(tmp_path, shards_of(8, 3), keep)
    assert ids == [["0", "1", "2"], ["3", "4", "5"], ["6", "7"]]
    assert rejects == []


def test_rejects_are_left_out_and_returned_in_order(tmp_path: Path) -> None:
    ids, rejects = build(tmp_path, shards_of(8, 3), partial(reject_multiples, 3))
    assert ids == [["1", "2"], ["4", "5"], ["7"]]
    assert rejects == [Reject(str(number), "divides by 3") for number in (0, 3, 6)]


def test_a_shard_of_rejects_alone_is_empty(tmp_path: Path) -> None:
    ids, rejects = build(tmp_path, shards_of(4, 2), partial(reject_multiples, 1))
    assert ids == [[], []]
    assert len(rejects) == 4


def test_finished_shards_are_not_built_again(tmp_path: Path) -> None:
    with pytest.raises(StopError):
        build(tmp_path, shards_of(12, 3), partial(fail_at, 7))
    worked: list[int] = []

    def work(number: int) -> Row | Reject:
        worked.append(number)
        return reject_multiples(3, number)

    ids, rejects = build(tmp_path, shards_of(12, 3), work)
    # The shard after the failed one may already have been started.
    assert sorted(worked) in (list(range(6, 9)), list(range(6, 12)))
    assert ids == [["1", "2"], ["4", "5"], ["7", "8"], ["10", "11"]]
    assert [reject.id for reject in rejects] == ["0", "3", "6", "9"]


def test_a_half_written_shard_is_built_again(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / f".{shard_name(0)}.partial").write_bytes(b"PAR1 half")
    ids, _ = build(tmp_path, shards_of(2, 2), keep)
    assert ids == [["0", "1"]]
    assert [path.name for path in (tmp_path / "shards").iterdir()] == [shard_name(0)]


def test_too_many_rejects_stop_the_work_and_the_first_ten_are_named(tmp_path: Path) -> None:
    limit = RejectLimit("fetch.max_rejects", 0.25)
    with pytest.raises(UserError) as caught:
        build(tmp_path, shards_of(60, 40), partial(reject_multiples, 2), limit)
    text = str(caught.value)
    assert text.startswith("20 of 60 are unusable, more than fetch.max_rejects (0.25) allows.")
    named = [f"{number} (divides by 2)" for number in range(0, 20, 2)]
    assert ", ".join(named) in text
    assert "20 (divides by 2)" not in text
    assert "\n" not in text


def test_after_too_many_rejects_only_their_shards_are_tried_again(tmp_path: Path) -> None:
    def reject_after_five(number: int) -> Row | Reject:
        return keep(number) if number < 6 else Reject(str(number), "gone")

    with pytest.raises(UserError):
        build(tmp_path, shards_of(12, 3), reject_after_five, RejectLimit("k", 0.1))
    worked: list[int] = []

    def fixed(number: int) -> Row:
        worked.append(number)
        return keep(number)

    ids, rejects = build(tmp_path, shards_of(12, 3), fixed, RejectLimit("k", 0.1))
    assert sorted(worked) == list(range(6, 12))
    assert sum(ids, []) == [str(number) for number in range(12)]  # noqa: RUF017
    assert rejects == []


@pytest.mark.parametrize(
    ("share", "rejected", "stops"),
    [
        (0.0, 0, False),
        (0.0, 1, True),
        (0.01, 1, False),
        (0.01, 2, True),
        (0.29, 29, False),
        (0.29, 30, True),
        (1.0, 100, False),
    ],
)
def test_rejects_up_to_the_limit_are_allowed(
    tmp_path: Path, share: float, rejected: int, stops: bool
) -> None:
    def work(number: int) -> Row | Reject:
        return Reject(str(number), "gone") if number < rejected else keep(number)

    with pytest.raises(UserError, match=" of 100 are unusable") if stops else nullcontext():
        _, rejects = build(tmp_path, shards_of(100, 100), work, RejectLimit("k", share))
        assert len(rejects) == rejected


def test_a_stricter_limit_holds_for_finished_shards_too(tmp_path: Path) -> None:
    build(tmp_path, shards_of(9, 3), partial(reject_multiples, 3))
    with pytest.raises(UserError, match=" of 9 are unusable"):
        build(tmp_path, shards_of(9, 3), partial(reject_multiples, 3), RejectLimit("k", 0.1))


def sizes_table(sizes: list[int]) -> pa.Table:
    return pa.table({"id": [str(position) for position in range(len(sizes))], "size": sizes})


def test_a_shard_ends_before_its_photographs_are_too_many_for_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(building, "_MOST_SHARD_BYTES", 100)
    shards = plan_shards(sizes_table([10, 90, 10, 500, 10, 10, 10, 10]), 3, "size")
    held = [shard.source["size"].to_pylist() for shard in shards]
    assert held == [[10, 90], [10], [500], [10, 10, 10], [10]]
    assert [shard.rows for shard in shards] == [2, 1, 1, 3, 1]
    assert [shard.name for shard in shards] == [shard_name(position) for position in range(5)]


def test_without_sizes_a_shard_has_the_wanted_rows() -> None:
    shards = plan_shards(sizes_table([10**12] * 5), 2)
    assert [shard.rows for shard in shards] == [2, 2, 1]
    assert plan_shards(sizes_table([]), 2) == []


def test_a_shard_goes_to_another_machine_without_the_rest_of_its_table() -> None:
    table = pa.table({"id": ["x" * 1000] * 1000})
    shard = plan_shards(table, 10)[5]
    assert len(pickle.dumps(shard)) < 20_000
    assert pickle.loads(pickle.dumps(shard)).source.equals(shard.source)  # noqa: S301
