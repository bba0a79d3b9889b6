import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from stages.runtime.machine import usable_cores
from stages.sharding.parallel import map_in_order


class StopError(Exception):
    """What breaks the work in these tests."""


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_at_first(number: int) -> int:
        time.sleep(0.02 if number < 4 else 0)
        return number * 2

    results = map_in_order(slow_at_first, range(40), workers=8, window=16)
    assert list(results) == [number * 2 for number in range(40)]


def test_no_items_give_no_results() -> None:
    assert list(map_in_order(str, [], workers=2, window=4)) == []


@pytest.mark.parametrize(("workers", "window"), [(1, 1), (3, 1), (1, 5), (4, 100)])
def test_every_pool_gives_every_result(workers: int, window: int) -> None:
    assert list(map_in_order(str, range(20), workers, window)) == [str(n) for n in range(20)]


def test_items_are_read_no_further_than_the_window() -> None:
    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        for number in range(100):
            read += 1
            yield number

    with closing(map_in_order(str, items(), workers=2, window=5)) as results:
        for given, _ in enumerate(results, start=1):
            assert read <= given + 5
    assert read == 100


def test_as_many_calls_run_at_once_as_there_are_workers() -> None:
    meeting = threading.Barrier(4, timeout=10)
    results = map_in_order(lambda _: meeting.wait(), range(8), workers=4, window=8)
    assert sorted(results) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_failure_is_raised_at_its_place() -> None:
    def fail_at_three(number: int) -> int:
        if number == 3:
            raise StopError
        return number

    results = map_in_order(fail_at_three, range(10), workers=4, window=10)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(StopError):
        next(results)


def test_calls_that_have_not_started_are_cancelled_when_one_fails() -> None:
    all_submitted = threading.Event()
    started: list[int] = []

    def fail_first(number: int) -> None:
        started.append(number)
        all_submitted.wait(10)
        if number == 0:
            raise StopError
        # Long enough for the cancelling to come before the last of fifty.
        time.sleep(0.01)

    def items() -> Iterator[int]:
        yield from range(50)
        all_submitted.set()

    with pytest.raises(StopError):
        list(map_in_order(fail_first, items(), workers=1, window=50))
    assert len(started) < 50


def test_a_failure_of_the_items_is_raised() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise StopError

    with pytest.raises(StopError):
        list(map_in_order(str, items(), workers=2, window=4))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_only_the_cores_given_to_the_process_are_usable() -> None:
    given = os.sched_getaffinity(0)
    assert usable_cores() == len(given)
    os.sched_setaffinity(0, {min(given)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, given)
