"""Many requests at once, their results in order, in bounded memory."""

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterable
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Generic, NamedTuple, TypeVar

import uvloop

T = TypeVar("T")
R = TypeVar("R")


def await_in_order(
    function: Callable[[T], Awaitable[R]], items: Iterable[T], workers: int, window: int
) -> Generator[R, None, None]:
    """As parallel.map_in_order, for coroutines, of which `workers` run at once.

    An event loop, in a thread beside the caller's, has thousands of requests a second for two
    thirds of the CPU that hundreds of threads take, each of which waits for the interpreter.
    """
    crew = _Crew(function, items, window)
    loop = uvloop.new_event_loop()
    work = loop.create_task(crew.work(workers))
    thread = Thread(target=_run, args=(loop, work))
    thread.start()
    try:
        while batch := crew.batches.get():
            for outcome in batch:
                if isinstance(outcome, _Failure):
                    raise outcome.error
                yield outcome
            loop.call_soon_threadsafe(crew.make_room, len(batch))
        thread.join()
        # What is no Exception, like a panic of a library in Rust, ends all of it.
        work.result()
    finally:
        loop.call_soon_threadsafe(work.cancel)
        thread.join()
        loop.close()


def _run(loop: asyncio.AbstractEventLoop, work: asyncio.Task[None]) -> None:
    # The caller looks at how it ended.
    with suppress(BaseException):
        loop.run_until_complete(work)


class _Failure(NamedTuple):
    error: Exception


class _Crew(Generic[T, R]):
    """The coroutines of await_in_order. All but `batches` belongs to their thread.

    `batches`: outcomes in the items' order, as many as there are at a time, since a hand-over from
    thread to thread costs more than an outcome; an empty one is the end.
    """

    def __init__(
        self, function: Callable[[T], Awaitable[R]], items: Iterable[T], window: int
    ) -> None:
        self.batches: SimpleQueue[list[R | _Failure]] = SimpleQueue()
        self._function = function
        self._items = iter(items)
        self._room = asyncio.Semaphore(window)
        self._begun = 0
        self._handed_over = 0
        self._finished: dict[int, R | _Failure] = {}

    async def work(self, workers: int) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(self._work_alone())
        finally:
            self._hand_over()
            self.batches.put([])

    def make_room(self, count: int) -> None:
        for _ in range(count):
            self._room.release()

    async def _work_alone(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            number, self._begun = self._begun, self._begun + 1
            try:
                self._finished[number] = await self._function(next(self._items))
            except StopIteration:
                # Others may wait for room to find that out.
                self._room.release()
                return
            except Exception as error:  # noqa: BLE001 - raised at its place
                self._finished[number] = _Failure(error)
            # What else is finished by then goes along.
            if number == self._handed_over:
                loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        batch = []
        while self._handed_over in self._finished:
            batch.append(self._finished.pop(self._handed_over))
            self._handed_over += 1
        if batch:
            self.batches.put(batch)
