"""The rate limits of one server: requests and tokens per minute, and how many requests at the same time.

A request reserves the most tokens that it can take, and when it has ended the reservation becomes what it took. How many
requests a server takes at once is found out, as in TCP: the limit doubles until the server first answers 429, then grows by a
twentieth for each round of answers that has used it, and is cut once for each episode of 429. The design follows that of
inspect_ai (adaptive connections).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from alignpro.config import EndpointConfig
from alignpro.endpoints.types import Verdict
from alignpro.errors import EndpointError

MINUTE = 60.0
START = 8
"""Requests at the same time, at first."""
SMALLEST_ROUND = 8
"""Answers after which a small limit may grow."""
SATURATED = 0.8
"""Part of the limit that must have been used, for it to grow: what was never tried says nothing."""
GROWTH = 0.05
FIRST_CUT = 0.5
"""Undoes the last doubling."""
CUT = 0.8


class AdaptiveConcurrency:
    """How many requests may be in flight, from how they end.

    A request belongs to the epoch in which it was sent, and a cut begins a new one. What ends from an older epoch says nothing
    about the limit that holds now: so an episode of 429 is one cut, however many requests it strikes.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = min(START, most)
        self.in_flight = 0
        self._epoch = 0
        self._is_slow_start = True
        self._begin_round()

    def _begin_round(self) -> None:
        self._clean, self._peak = 0, self.in_flight

    def start(self) -> int:
        """Count a request that is sent; returns its epoch."""
        self.in_flight += 1
        self._peak = max(self._peak, self.in_flight)
        return self._epoch

    def end(self, kind: str, epoch: int) -> None:
        """Count the end of a request; ``kind`` is that of its `Verdict`."""
        self.in_flight -= 1
        if epoch != self._epoch:
            return
        if kind == "throttled":
            self.limit = max(int(self.limit * (FIRST_CUT if self._is_slow_start else CUT)), 1)
            self._is_slow_start = False
            self._epoch += 1
            self._begin_round()
        elif kind == "ok":
            self._clean += 1
            if self._clean >= max(self.limit, SMALLEST_ROUND):
                self._grow()
                self._begin_round()
        else:  # a server that fails is not known to be asked too often: its limit stays
            self._begin_round()

    def _grow(self) -> None:
        if self._peak >= SATURATED * self.limit:
            step = self.limit if self._is_slow_start else max(1, round(GROWTH * self.limit))
            self.limit = min(self.limit + step, self.most)


class Window:
    """What was used in the last minute, of a limit that holds for every minute. A rate below 1 is one in a longer time."""

    def __init__(self, per_minute: float) -> None:
        self.limit = max(per_minute, 1.0)
        self.seconds = MINUTE * max(1.0, 1 / per_minute)
        self._used = 0.0
        self._entries: deque[list[float]] = deque()  # [time, amount]

    def wait(self, now: float, amount: float) -> float:
        """Seconds until so much may be used."""
        while self._entries and self._entries[0][0] + self.seconds <= now:
            self._used -= self._entries.popleft()[1]
        excess = self._used + amount - self.limit
        for at, freed in self._entries:
            if excess <= 0:
                break
            excess -= freed
            if excess <= 0:
                return at + self.seconds - now
        return 0.0

    def add(self, now: float, amount: float) -> list[float]:
        """Use it; returns the entry, for `settle`."""
        self._used += amount
        self._entries.append([now, amount])
        return self._entries[-1]

    def settle(self, entry: list[float], amount: float) -> None:
        """Replace what was reserved by what was taken."""
        if self._entries and entry[0] >= self._entries[0][0]:  # otherwise it has left the window
            self._used += amount - entry[1]
            entry[1] = amount


@dataclass
class RatePermit:
    """The right to have one request in flight."""

    limits: RateLimits
    epoch: int
    entry: list[float] | None

    async def release(self, verdict: Verdict) -> None:
        """Report how the request ended."""
        self.limits.end(self, verdict)


class RateLimits:
    """The limits of one server; see `alignpro.endpoints.types.Limits`. Used by one event loop.

    Args:
        max_concurrency: Most requests at the same time.
        requests_per_minute: In any minute.
        tokens_per_minute: In any minute, counted when a request is sent.
        clock: Seconds.
    """

    def __init__(
        self,
        max_concurrency: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.concurrency = AdaptiveConcurrency(max_concurrency)
        self._requests = None if requests_per_minute is None else Window(requests_per_minute)
        self._tokens = None if tokens_per_minute is None else Window(tokens_per_minute)
        self._clock = clock
        self._quiet_until = clock()
        self._waiting: deque[tuple[int, asyncio.Future[RatePermit]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    def of(cls, config: EndpointConfig) -> RateLimits:
        """The limits that a configuration names."""
        return cls(config.max_concurrency, config.requests_per_minute, config.tokens_per_minute)

    async def acquire(self, tokens: int) -> RatePermit:
        """Wait until a request of at most this many tokens may be sent; first come, first served.

        Raises:
            EndpointError: It never may.
        """
        if self._tokens is not None and tokens > self._tokens.limit:
            raise EndpointError(
                f"a request can take {tokens} tokens (the bytes of its prompt and the most of its answer), "
                f"more than tokens_per_minute={self._tokens.limit:g}: raise that, or lower the tokens of an answer"
            )
        future: asyncio.Future[RatePermit] = asyncio.get_running_loop().create_future()
        self._waiting.append((tokens, future))
        self._dispatch()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():  # granted, but nobody is there to use it
                await future.result().release(Verdict("failed", tokens=0))
            raise

    def _dispatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting and self.concurrency.in_flight < self.concurrency.limit:
            tokens, future = self._waiting[0]
            if not future.done():
                now = self._clock()
                delay = self._delay(now, tokens)
                if delay > 0:
                    self._timer = asyncio.get_running_loop().call_later(delay, self._dispatch)
                    return
                future.set_result(self._grant(now, tokens))
            self._waiting.popleft()

    def _delay(self, now: float, tokens: int) -> float:
        requests = 0.0 if self._requests is None else self._requests.wait(now, 1)
        return max(self._quiet_until - now, requests, 0.0 if self._tokens is None else self._tokens.wait(now, tokens))

    def _grant(self, now: float, tokens: int) -> RatePermit:
        if self._requests is not None:
            self._requests.add(now, 1)
        entry = None if self._tokens is None else self._tokens.add(now, tokens)
        return RatePermit(self, self.concurrency.start(), entry)

    def end(self, permit: RatePermit, verdict: Verdict) -> None:
        """Settle a request, and send the next."""
        self.concurrency.end(verdict.kind, permit.epoch)
        if self._tokens is not None and permit.entry is not None and verdict.tokens is not None:
            self._tokens.settle(permit.entry, verdict.tokens)
        if verdict.retry_after is not None:
            self._quiet_until = max(self._quiet_until, self._clock() + verdict.retry_after)
        self._dispatch()
