"""Asking a store again until a deadline, and counting why."""

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import count
from typing import TypeVar

T = TypeVar("T")

# No attempt begins later than this after the first, in seconds: with the time-out of the last one
# and a look at whether it is the store, an outage is known within a minute.
DEADLINE = 35.0
# What an answer like 404 is believed after. One wrong answer in ten costs none of 500,000 objects.
ATTEMPTS = 8
_FIRST_WAIT = 0.05
_LONGEST_WAIT = 4.0


class FailedAttempt(Exception):  # noqa: N818 - it becomes an error when the last attempt fails
    """What was asked for did not come: `kind` for the count, and the text is the reason.

    `definite` is an answer that may well be true, believed after ATTEMPTS; `error` is what the
    store raised, if it did.
    """

    def __init__(
        self, kind: str, reason: str, *, definite: bool, error: Exception | None = None
    ) -> None:
        super().__init__(reason)
        self.kind = kind
        self.definite = definite
        self.error = error


class Retries:
    """The attempts of a stage: what was tried again, and what was read."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        # Counted on the readers' thread, taken on another.
        self._lock = threading.Lock()
        #: The last object that came whole, and when, by time.monotonic().
        self.last_read: tuple[str, float] | None = None
        #: Set once nothing can be read any more; then every attempt raises it.
        self.outage: Exception | None = None

    async def run(self, attempt: Callable[[], Awaitable[T]], seconds: float) -> T:
        """What `attempt` returns, tried for so long, with backoff and full jitter in between.

        Raises the last FailedAttempt, or the outage that another reader has found.
        """
        start = time.monotonic()
        for number in count(1):
            if self.outage is not None:
                raise self.outage
            try:
                return await attempt()
            except FailedAttempt as failed:
                wait = random.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (number - 1)))
                late = time.monotonic() + wait - start >= seconds
                if late or (failed.definite and number >= ATTEMPTS):
                    raise
                with self._lock:
                    self._counts[failed.kind] += 1
            await asyncio.sleep(wait)
        raise AssertionError("count has no end")

    def __reduce__(self) -> tuple[type["Retries"], tuple[()]]:
        """Another machine counts its own."""
        return Retries, ()

    def take_counts(self) -> Counter[str]:
        """What was tried again since the last call, which is then forgotten."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return counts

    def add_counts(self, counts: Counter[str]) -> None:
        with self._lock:
            self._counts += counts

    def summary(self) -> str:
        """Like "; retried 16: 9 x server error, 7 x reset", the most frequent first, or ""."""
        if not self._counts:
            return ""
        kinds = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        named = ", ".join(f"{number} x {kind}" for kind, number in kinds)
        return f"; retried {self._counts.total()}: {named}"
