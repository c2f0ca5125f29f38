"""The requests to a server: sent within the limits and the budget, repeated while a failure may pass, and counted."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_base

from alignpro.config import EndpointConfig
from alignpro.endpoints.client import HttpClient
from alignpro.endpoints.exchange import Bought, Exchange, FailureError, RefusalError, Request
from alignpro.endpoints.limits import RateLimits
from alignpro.endpoints.types import Books, Limits, Verdict
from alignpro.endpoints.wire import Received
from alignpro.errors import EndpointError


class _RandomExponential(wait_base):
    """Random below a bound that doubles with each attempt.

    tenacity's own draws from the global generator, from which a user's reward may draw: its results must not depend on how
    often a server failed.

    Args:
        first: The first bound, in seconds.
        most: The largest.
    """

    def __init__(self, first: float, most: float) -> None:
        self._first, self._most = first, most
        self._generator = random.Random()

    def __call__(self, retry_state: RetryCallState) -> float:
        bound = min(self._first * 2.0 ** (retry_state.attempt_number - 1), self._most)
        return self._generator.uniform(0, bound)


BACKOFF = _RandomExponential(0.5, 60)
"""Seconds before a request is repeated, when the server does not say: random below 0.5, 1, 2, … 60."""


@dataclass(frozen=True)
class EndpointStats:
    """What an endpoint has done since it was opened."""

    requests: int = 0
    """Sent, repetitions included."""
    replayed: int = 0
    """Answers that came from the ledger."""
    input_tokens: int = 0
    output_tokens: int = 0
    throttled: int = 0
    """Answers of 429."""
    server_errors: int = 0
    """Other failures that were repeated: 5xx, broken connections, answers that cannot be read."""
    retries: int = 0
    without_usage: int = 0
    """Answers that did not say how many tokens they took, and were charged at their bound."""
    filtered: int = 0
    overflow: int = 0
    seconds_waiting: float = 0.0
    """For the limits, summed over requests."""
    in_flight: int = 0
    concurrency: int | None = None
    """Most requests at the same time, as found so far; None if another process decides."""


_COUNTS = tuple(one.name for one in fields(EndpointStats) if one.type == "int" and one.name != "in_flight")


@dataclass
class _Failures:
    """Failures in a row, of any requests. Those that were in flight together when one failed count once."""

    most: int
    count: int = 0
    _seen: int = 0

    def begin(self) -> int:
        """What a request that is sent now must tell when it fails."""
        return self._seen

    def succeed(self) -> None:
        self.count = 0

    def fail(self, began: int) -> bool:
        """Count a failure; returns whether it was one too many."""
        if began == self._seen:
            self._seen += 1
            self.count += 1
        return self.count >= self.most


class Sender:
    """Sends the requests of an endpoint, in its event loop.

    Args:
        config: The server.
        books: The ledger and the budget.
        limits: Its rate limits.
        loop: Where it runs.
        backoff: How long to wait before a request is repeated.
        path: Of a server of any JSON, what comes after the base URL.
        end: Called with a failure that cannot pass, before anything else is sent; it sets `fatal`.

    Raises:
        EndpointError: A variable of the environment is not set, or the certificates cannot be read.
    """

    def __init__(
        self,
        config: EndpointConfig,
        books: Books,
        limits: Limits,
        loop: asyncio.AbstractEventLoop,
        backoff: wait_base,
        path: str | None,
        end: Callable[[BaseException], None],
    ) -> None:
        self._config, self._books, self._limits, self._loop = config, books, limits, loop
        self._backoff, self._end = backoff, end
        self.client = HttpClient(config, path)
        self._exchange = Exchange(config, self.client, books)
        self._failures = _Failures(config.max_failures)
        self._counts = dict.fromkeys(_COUNTS, 0)  # read by other threads, so it keeps its size
        self._seconds_waiting = 0.0
        self.sending: set[asyncio.Task[Any]] = set()
        """What must not be cancelled, since a purchase of it is open."""
        self.fatal: BaseException | None = None
        """Why nothing more is sent."""

    @property
    def stats(self) -> EndpointStats:
        """What it has done so far; from any thread."""
        limit = self._limits.concurrency.limit if isinstance(self._limits, RateLimits) else None
        counts = {**self._counts, "in_flight": len(self.sending)}
        return EndpointStats(**counts, seconds_waiting=self._seconds_waiting, concurrency=limit)

    def count_replayed(self, answers: int) -> None:
        """Count answers that came from the ledger."""
        self._counts["replayed"] += answers

    async def send(self, request: Request) -> Received:
        """Send a request until it is answered, or has failed too often.

        Raises:
            EndpointError: It has, or the failure cannot pass.
        """
        first: list[FailureError] = []
        try:
            return await self._send_once(
                request
            )  # outside of the machinery below, which takes a tenth of a request's time
        except FailureError as failure:
            first.append(failure)

        async def attempt() -> Received:
            if first:
                raise first.pop()
            return await self._send_once(request)

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(FailureError),
            stop=stop_after_attempt(self._config.max_retries + 1),
            wait=self._backoff,
            before_sleep=self._count_retry,
            reraise=True,
        )
        try:
            return await retrying(attempt)
        except FailureError as failure:
            raise EndpointError(
                f"{self._config.base_url}, model {self._config.model}: {failure}; tried {self._config.max_retries + 1} times"
            ) from None

    def _count_retry(self, state: RetryCallState) -> None:
        self._counts["retries"] += 1

    async def _send_once(self, request: Request) -> Received:
        """Send a request once.

        Raises:
            FailureError: It failed in a way that may pass.
            EndpointError: It failed in a way that cannot pass, or too many have failed in a row.
        """
        if self.fatal is not None:  # while it waited to be repeated
            raise self.fatal
        began = self._loop.time()
        permit = await self._limits.acquire(request.bound.total)
        self._seconds_waiting += self._loop.time() - began
        task = asyncio.current_task()
        assert task is not None
        self.sending.add(task)  # from here on it is not cancelled: what is reserved must be settled
        verdict = Verdict("failed", tokens=0)
        try:
            purchase = await self._books.reserve(request.keys, request.bound)
            if self.fatal is not None:
                await self._books.refund(purchase, "not sent: another request has ended the run")
                raise self.fatal
            failures = self._failures.begin()
            result = await self._exchange.send(purchase, request)
            verdict = result.verdict
            self._count(result)
            self._judge(result, failures)
        except FailureError:
            raise
        except BaseException as error:
            if not (request.is_probe and isinstance(error, RefusalError)):
                self._end(error)  # before the permit goes to the next
            raise
        finally:
            await permit.release(verdict)
            self.sending.discard(task)
        return result.received

    def _judge(self, result: Bought, failures: int) -> None:
        """Raise if it failed: for good if too many have in a row."""
        if not result.failure:
            self._failures.succeed()
        elif self._failures.fail(failures):
            raise EndpointError(
                f"{self._config.base_url}, model {self._config.model}: {self._failures.count} failures in a row; "
                f"the last: {result.failure}"
            )
        else:
            raise FailureError(result.failure)

    def _count(self, result: Bought) -> None:
        counts, usage = self._counts, result.received.usage
        counts["requests"] += 1
        counts["throttled"] += result.verdict.kind == "throttled"
        counts["server_errors"] += result.verdict.kind == "server_error"
        if usage is not None:
            counts["input_tokens"] += usage.input
            counts["output_tokens"] += usage.output
        counts["without_usage"] += usage is None and result.verdict.kind == "ok"
        for answer in result.received.answers:
            if answer is not None and answer.finish_reason in ("filtered", "overflow"):
                counts[answer.finish_reason] += 1
