"""How many requests are taken on at once: a number of places, and a bounded queue before them."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from alignpro.config import ServeLimitsConfig
from alignpro.serving.refusals import Refusal

_SHARE = 0.05
"""Weight of the newest request in the mean time of a request."""
_LONGEST_RETRY = 60


class Admission:
    """Gives requests their places, first come first served."""

    def __init__(self, limits: ServeLimitsConfig) -> None:
        self._limits = limits
        self._present = 0
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._mean_seconds = 1.0

    @property
    def running(self) -> int:
        """Requests that have a place."""
        return self._running

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    @contextmanager
    def presence(self) -> Iterator[None]:
        """Let a request in before its body is read: the bodies in memory are bounded by this.

        Raises:
            Refusal: With 429: as many are here as may run and wait together.
        """
        if self._present >= self._limits.concurrent + self._limits.queued:
            raise self._refusal()
        self._present += 1
        try:
            yield
        finally:
            self._present -= 1

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place, and hold it.

        Raises:
            Refusal: With 429: the queue is full, or none became free in time.
        """
        if self._running < self._limits.concurrent:
            self._running += 1
        else:
            await self._wait()
        began = time.monotonic()
        try:
            yield
        finally:
            self._mean_seconds += _SHARE * (time.monotonic() - began - self._mean_seconds)
            self._leave()

    async def _wait(self) -> None:
        if len(self._waiting) >= self._limits.queued:
            raise self._refusal()
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self._limits.queue_seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._leave()  # the place came at the same moment
            elif turn in self._waiting:
                self._waiting.remove(turn)
            if isinstance(error, TimeoutError):
                raise self._refusal() from None
            raise

    def _leave(self) -> None:
        """Hand the place to the next who waits."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # it was cancelled, and its task has not run since
                turn.set_result(None)
                return
        self._running -= 1

    def _refusal(self) -> Refusal:
        ahead = len(self._waiting) + 1
        seconds = min(max(math.ceil(self._mean_seconds * ahead / self._limits.concurrent), 1), _LONGEST_RETRY)
        retry = (b"retry-after", b"%d" % seconds)
        return Refusal(429, f"Too many requests at once: try again in {seconds} s.", "overloaded", headers=[retry])
