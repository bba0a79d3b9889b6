"""Many calls at once, their results in order, in bounded memory."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_in_order(
    function: Callable[[T], R], items: Iterable[T], workers: int, window: int
) -> Generator[R, None, None]:
    """Yield function(item) in the order of items, with at most `window` results under way.

    For work that lets the interpreter go, as each call has a thread. `items` is read lazily, only
    as far as the window reaches. An exception of one call is raised at its place; calls not yet
    started are then cancelled.
    """
    pending: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            if len(pending) >= window:
                yield pending.popleft().result()
            pending.append(pool.submit(function, item))
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
