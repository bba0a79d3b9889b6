import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from stages.collecting.awaiting import await_in_order


class StopError(Exception):
    """What breaks the work in these tests."""


async def echo(number: int) -> int:
    await asyncio.sleep(0)
    return number


def numbers_and_a_failure() -> Iterator[int]:
    yield 1
    raise StopError


def test_results_come_in_the_order_of_the_items() -> None:
    async def slow_at_first(number: int) -> int:
        await asyncio.sleep(0.02 if number < 4 else 0)
        return number * 2

    results = await_in_order(slow_at_first, range(40), workers=8, window=16)
    assert list(results) == [number * 2 for number in range(40)]


@pytest.mark.parametrize("count", [0, 1, 20])
@pytest.mark.parametrize(("workers", "window"), [(1, 1), (3, 1), (1, 5), (4, 100)])
def test_every_item_has_its_result(count: int, workers: int, window: int) -> None:
    assert list(await_in_order(echo, range(count), workers, window)) == list(range(count))


def test_items_are_read_no_further_than_the_window() -> None:
    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        for number in range(100):
            read += 1
            yield number

    with closing(await_in_order(echo, items(), workers=2, window=5)) as results:
        for given, _ in enumerate(results, start=1):
            assert read <= given + 5
    assert read == 100


def test_as_many_calls_run_at_once_as_there_are_workers() -> None:
    under_way = most = 0

    async def count(_: int) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1

    list(await_in_order(count, range(20), workers=4, window=8))
    assert most == 4


def test_one_slow_call_stops_the_others_only_at_the_window() -> None:
    released = asyncio.Event()
    begun: list[int] = []

    async def wait_at_first(number: int) -> int:
        begun.append(number)
        if number == 0:
            await released.wait()
        if number == 9:
            released.set()
        return number

    assert list(await_in_order(wait_at_first, range(30), workers=2, window=10)) == list(range(30))
    assert begun[:10] == list(range(10))


def test_a_failure_is_raised_at_its_place_and_ends_the_others() -> None:
    cancelled = threading.Event()

    async def fail_at_three(number: int) -> int:
        if number == 3:
            raise StopError
        if number > 3:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.set()
                raise
        return number

    results = await_in_order(fail_at_three, range(10), workers=5, window=10)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(StopError):
        next(results)
    assert cancelled.is_set()


def test_a_failure_of_the_items_is_raised_at_its_place() -> None:
    results = await_in_order(echo, numbers_and_a_failure(), workers=2, window=4)
    assert next(results) == 1
    with pytest.raises(StopError):
        next(results)


def test_whoever_wants_no_more_results_waits_for_none() -> None:
    async def slow(number: int) -> int:
        await asyncio.sleep(60 * (number > 0))
        return number

    with closing(await_in_order(slow, range(10), workers=3, window=3)) as results:
        assert next(results) == 0


class PanicError(BaseException):
    """As libraries in Rust raise it."""


def test_what_is_no_exception_is_raised_too_and_ends_nothing_early() -> None:
    async def panic_at_three(number: int) -> int:
        await asyncio.sleep(0)
        if number == 3:
            raise PanicError
        return number

    with pytest.raises(BaseExceptionGroup) as caught:
        list(await_in_order(panic_at_three, range(10), workers=2, window=4))
    assert caught.group_contains(PanicError)
