"""A server that is asked: queries go in from any thread, and their answers come back in a future.

What the books hold is not asked again. The rest is sent within the limits and the budget, repeated while a failure may pass, and
recorded before it is handed on. A failure that cannot pass ends the endpoint: all that wait get the same error, what is in
flight is awaited and recorded, and nothing more is sent.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_base

from alignpro.config import EndpointConfig
from alignpro.endpoints.client import HttpClient
from alignpro.endpoints.exchange import Bought, Exchange, FailureError, RefusalError, Request
from alignpro.endpoints.limits import RateLimits
from alignpro.endpoints.preflight import Findings, Probe, examine
from alignpro.endpoints.types import Answer, Books, DrawKey, Limits, Query, Sampling, Usage, Verdict
from alignpro.endpoints.wire import Received, draw_keys, request_body, upper_bound, with_draws
from alignpro.errors import EndpointError

_log = logging.getLogger("alignpro")


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


T = TypeVar("T")


class Endpoint:
    """A server; made by `EndpointSession.endpoint`, whose event loop it runs in.

    Args:
        config: The server.
        books: The ledger and the budget.
        limits: Its rate limits.
        loop: Where it runs.
        backoff: How long to wait before a request is repeated.
        path: Of a server of any JSON, what comes after the base URL; then it takes `post`, and no queries.

    Raises:
        EndpointError: A variable of the environment is not set, or the certificates cannot be read.
    """

    def __init__(
        self,
        config: EndpointConfig,
        books: Books,
        limits: Limits,
        loop: asyncio.AbstractEventLoop,
        backoff: wait_base = BACKOFF,
        path: str | None = None,
    ) -> None:
        self.config = config
        self._path = path
        self._loop, self._books, self._limits, self._backoff = loop, books, limits, backoff
        self._client = HttpClient(config, path)
        self._exchange = Exchange(config, self._client, books)
        self._failures = _Failures(config.max_failures)
        self._counts = dict.fromkeys(_COUNTS, 0)  # read by other threads, so it keeps its size
        self._seconds_waiting = 0.0
        self._served: Counter[tuple[str, str]] = Counter()
        self._fatal: BaseException | None = None
        self._pending: set[Future[Any]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._sending: set[asyncio.Task[Any]] = set()
        self._asked: dict[DrawKey, asyncio.Future[Answer]] = {}
        self._findings: asyncio.Task[Findings] | None = None

    def __repr__(self) -> str:
        return f"Endpoint({self.config.base_url}, {self.config.model})"

    # ------------------------------------------------------------------------------------------------- from any thread

    def submit(self, query: Query) -> Future[list[Answer]]:
        """Ask; the future holds an answer for each of ``query.draws``, in their order.

        Raises (by the future):
            EndpointError: The server cannot be used, or has failed for good.
            BudgetError: The next request could exceed the budget.
        """
        return self._submit(lambda: self._answer(query))

    def post(self, body: str, check: Callable[[Any], object]) -> Future[Answer]:
        """Send any JSON; the text of the answer is what came back, as JSON. Limits, ledger and budget are those of queries.

        Args:
            body: Canonical JSON: it identifies the answer in the ledger.
            check: Raises an `AlignProError` for an answer that is of no use; then it is not recorded.

        Raises (by the future):
            EndpointError: The server cannot be used, or has failed for good.
            BudgetError: The request could exceed the budget.
        """
        return self._submit(lambda: self._post(body, check))

    def preflight(self, sampling: Sampling) -> Findings:
        """Check URL, key, model and parameters with a few small requests, and wait for the result; done once.

        Raises:
            EndpointError: The server cannot be used, or refuses or ignores a parameter; the message names it.
            BudgetError: The requests could exceed the budget.
        """
        return self._submit(lambda: self._find_out(sampling, always=True)).result()

    @property
    def stats(self) -> EndpointStats:
        """What it has done so far."""
        limit = self._limits.concurrency.limit if isinstance(self._limits, RateLimits) else None
        counts = {**self._counts, "in_flight": len(self._sending)}
        return EndpointStats(**counts, seconds_waiting=self._seconds_waiting, concurrency=limit)

    @property
    def served(self) -> dict[tuple[str, str], int]:
        """How many answers came from each (model, ``system_fingerprint``), as the server names them, replayed ones included.

        More than one is a change that moves the reward.
        """
        return dict(self._served)

    def _submit(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # what may have been sent cannot be taken back
        if self._fatal is not None:
            future.set_exception(self._fatal)
        else:
            self._loop.call_soon_threadsafe(self._start, work, future)
        return future

    # ------------------------------------------------------------------------------------------------------- in the loop

    def _start(self, work: Callable[[], Coroutine[Any, Any, Any]], future: Future[Any]) -> None:
        if self._fatal is not None:
            future.set_exception(self._fatal)
            return
        self._pending.add(future)
        self._spawn(self._finish(work, future))

    async def _finish(self, work: Callable[[], Coroutine[Any, Any, Any]], future: Future[Any]) -> None:
        try:
            result = await work()
        except BaseException as error:  # whatever it is, whoever waits must learn of it
            self.end(error)
        else:
            if future in self._pending:
                self._pending.discard(future)
                future.set_result(result)

    def end(self, error: BaseException) -> None:
        """Fail all that wait with this error, and send nothing more; what is in flight goes on. The first error counts."""
        if self._fatal is None:
            self._fatal = error
        for future in self._pending:
            future.set_exception(self._fatal)
        self._pending.clear()
        self._cancel_waiting()

    def _cancel_waiting(self) -> None:
        for task in self._tasks - self._sending:
            if task is not asyncio.current_task():
                task.cancel()

    async def close(self, grace_seconds: float) -> None:
        """Send nothing more, await what is in flight for a while, then break its connections, so that it is written off."""
        self.end(EndpointError(f"{self.config.base_url}: the connection was closed"))
        if self._sending:
            await asyncio.wait(self._sending, timeout=grace_seconds)
        self._client.abort()
        while others := self._tasks - {asyncio.current_task()}:
            self._cancel_waiting()
            await asyncio.wait(others, timeout=0.1)
        await self._client.aclose()

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # has been reported, to all that wait, by `end`

    # ----------------------------------------------------------------------------------------------------------- queries

    async def _answer(self, query: Query) -> list[Answer]:
        found = await self._find_out(query.sampling)
        body = request_body(self.config, query)
        keys = draw_keys(self.config, query, body)
        answers = await self._obtain(keys, lambda mine: self._find_or_buy(query, body, mine, found))
        return [answers[key] for key in keys]

    async def _post(self, body: str, check: Callable[[Any], object]) -> Answer:
        key = DrawKey(f"{self.config.base_url}{self._path or ''}", self.config.model, "json", body, 0)

        async def find_or_buy(keys: Sequence[DrawKey]) -> dict[DrawKey, Answer]:
            (recorded,) = await self._books.find(keys)
            if recorded is None:
                return await self._buy([Request((key,), body.encode(), Usage(0, 0), check=check)])
            self._counts["replayed"] += 1
            return {key: recorded}

        return (await self._obtain([key], find_or_buy))[key]

    async def _obtain(
        self,
        keys: Sequence[DrawKey],
        find_or_buy: Callable[[Sequence[DrawKey]], Awaitable[dict[DrawKey, Answer]]],
    ) -> dict[DrawKey, Answer]:
        """The answer to each key; those that somebody else waits for already are not asked for again."""
        others = {key: self._asked[key] for key in keys if key in self._asked}
        mine = [key for key in dict.fromkeys(keys) if key not in others]
        for key in mine:
            self._asked[key] = self._loop.create_future()
        try:
            answers = await find_or_buy(mine) if mine else {}
            for key, answer in answers.items():
                self._asked[key].set_result(answer)
        finally:
            for key in mine:
                self._asked.pop(key).cancel()  # without effect if it has its result
        for key, future in others.items():
            answers[key] = await asyncio.shield(future)
        for answer in answers.values():
            self._note(answer)
        return answers

    async def _find_or_buy(
        self, query: Query, body: str, keys: Sequence[DrawKey], found: Findings
    ) -> dict[DrawKey, Answer]:
        """Answers from the ledger, and those of the requests that it lacks: one for all draws, or one for each."""
        recorded = await self._books.find(keys)
        answers = {key: answer for key, answer in zip(keys, recorded, strict=True) if answer is not None}
        self._counts["replayed"] += len(answers)
        if not answers and len(keys) > 1 and found.n:
            answers |= await self._buy([self._request(query, body, keys, query.seed if found.seed else None)])
        missing = [key for key in keys if key not in answers]
        is_random = query.sampling.temperature > 0
        requests = [
            self._request(query, body, [key], key.draw if found.seed and is_random else None) for key in missing
        ]
        return answers | await self._buy(requests) if requests else answers

    def _request(self, query: Query, body: str, keys: Sequence[DrawKey], seed: int | None) -> Request:
        n = len(keys)
        sent = None if seed is None else seed % (1 << self.config.seed_bits)
        bound = upper_bound(self.config, query, body, n)
        return Request(tuple(keys), with_draws(body, n if n > 1 else None, sent), bound)

    async def _buy(self, requests: Sequence[Request]) -> dict[DrawKey, Answer]:
        if len(requests) == 1:
            return await self._bought(requests[0])
        tasks = [self._spawn(self._bought(request)) for request in requests]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)  # if this is cancelled, they go on
        received = [task.result() for task in done]  # raises the first error
        return {key: answer for one in received for key, answer in one.items()}

    def _note(self, answer: Answer) -> None:
        """Count the answer by who gave it."""
        served = (answer.model, answer.fingerprint)
        if served not in self._served and self._served:
            _log.warning(
                "%s: answers now come from model %r, fingerprint %r; before from %s: rewards may have moved",
                self.config.base_url,
                *served,
                ", ".join(f"{model!r}, {fingerprint!r}" for model, fingerprint in self._served),
            )
        self._served[served] += 1

    # ---------------------------------------------------------------------------------------------------------- requests

    async def _bought(self, request: Request) -> dict[DrawKey, Answer]:
        received = await self._repeat(request)
        pairs = zip(request.keys, received.answers, strict=True)
        return {key: answer for key, answer in pairs if answer is not None}

    async def _repeat(self, request: Request) -> Received:
        """Send a request until it is answered, or has failed too often.

        Raises:
            EndpointError: It has, or the failure cannot pass.
        """
        first: list[FailureError] = []
        try:
            return await self._send(request)  # outside of the machinery below, which takes a tenth of a request's time
        except FailureError as failure:
            first.append(failure)

        async def attempt() -> Received:
            if first:
                raise first.pop()
            return await self._send(request)

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(FailureError),
            stop=stop_after_attempt(self.config.max_retries + 1),
            wait=self._backoff,
            before_sleep=self._count_retry,
            reraise=True,
        )
        try:
            return await retrying(attempt)
        except FailureError as failure:
            raise EndpointError(
                f"{self.config.base_url}, model {self.config.model}: {failure}; tried {self.config.max_retries + 1} times"
            ) from None

    def _count_retry(self, state: RetryCallState) -> None:
        self._counts["retries"] += 1

    async def _send(self, request: Request) -> Received:
        """Send a request once.

        Raises:
            FailureError: It failed in a way that may pass.
            EndpointError: It failed in a way that cannot pass, or too many have failed in a row.
        """
        if self._fatal is not None:  # while it waited to be repeated
            raise self._fatal
        began = self._loop.time()
        permit = await self._limits.acquire(request.bound.total)
        self._seconds_waiting += self._loop.time() - began
        task = asyncio.current_task()
        assert task is not None
        self._sending.add(task)  # from here on it is not cancelled: what is reserved must be settled
        verdict = Verdict("failed", tokens=0)
        try:
            purchase = await self._books.reserve(request.keys, request.bound)
            if self._fatal is not None:
                await self._books.refund(purchase, "not sent: another request has ended the run")
                raise self._fatal
            failures = self._failures.begin()
            result = await self._exchange.send(purchase, request)
            verdict = result.verdict
            self._count(result)
            self._judge(result, failures)
        except FailureError:
            raise
        except BaseException as error:
            if not (request.is_probe and isinstance(error, RefusalError)):
                self.end(error)  # before the permit goes to the next
            raise
        finally:
            await permit.release(verdict)
            self._sending.discard(task)
        return result.received

    def _judge(self, result: Bought, failures: int) -> None:
        """Raise if it failed: for good if too many have in a row."""
        if not result.failure:
            self._failures.succeed()
        elif self._failures.fail(failures):
            raise EndpointError(
                f"{self.config.base_url}, model {self.config.model}: {self._failures.count} failures in a row; "
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

    # --------------------------------------------------------------------------------------------------------- preflight

    async def _find_out(self, sampling: Sampling, *, always: bool = False) -> Findings:
        """What the server supports: as configured, or asked once."""
        if self._findings is None:
            if not always and self.config.n is not None and self.config.seed is not None:
                return Findings(self.config.n, self.config.seed)
            self._findings = self._spawn(examine(self.config, sampling, self._ask))
        return await asyncio.shield(self._findings)

    async def _ask(self, probe: Probe) -> Received:
        """Send a probe: it is paid for, but its answers are not recorded."""
        body = request_body(self.config, probe.query)
        keys = tuple(draw_keys(self.config, replace(probe.query, draws=tuple(range(probe.n))), body))
        bound = upper_bound(self.config, probe.query, body, probe.n)
        bytes_sent = with_draws(body, probe.n if probe.n > 1 else None, probe.seed)
        return await self._spawn(self._repeat(Request(keys, bytes_sent, bound, is_probe=True)))
