"""A server that is asked: queries go in from any thread, and their answers come back in a future.

What the books hold is not asked again. The rest is sent within the limits and the budget, repeated while a failure may pass, and
recorded before it is handed on. A failure that cannot pass ends the endpoint: all that wait get the same error, what is in
flight is awaited and recorded, and nothing more is sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from tenacity.wait import wait_base

from alignpro.config import EndpointConfig
from alignpro.endpoints.exchange import Request
from alignpro.endpoints.known_servers import KnownServers
from alignpro.endpoints.preflight import Findings, Probe, confirm, examine
from alignpro.endpoints.sender import BACKOFF, EndpointStats, Sender
from alignpro.endpoints.types import Answer, Books, DrawKey, Limits, Query, Sampling, Usage
from alignpro.endpoints.wire import Received, draw_keys, request_body, upper_bound, with_draws
from alignpro.errors import EndpointError

_log = logging.getLogger("alignpro")


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
        known: What was found of servers before; what this one finds is added.

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
        known: KnownServers | None = None,
    ) -> None:
        self.config = config
        self._known = known or KnownServers()
        self._path = path
        self._loop, self._books = loop, books
        self._sender = Sender(config, books, limits, loop, backoff, path, self.end)
        self._served: Counter[tuple[str, str]] = Counter()
        self._pending: set[Future[Any]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
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

        If the parameters were checked before, by this job or an earlier part of it, one request is sent.

        Raises:
            EndpointError: The server cannot be used, or refuses or ignores a parameter; the message names it.
            BudgetError: The requests could exceed the budget.
        """
        return self._submit(lambda: self._find_out(sampling, always=True)).result()

    @property
    def stats(self) -> EndpointStats:
        """What it has done so far."""
        return self._sender.stats

    @property
    def served(self) -> dict[tuple[str, str], int]:
        """How many answers came from each (model, ``system_fingerprint``), as the server names them, replayed ones included.

        More than one is a change that moves the reward.
        """
        return dict(self._served)

    def _submit(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # what may have been sent cannot be taken back
        if self._sender.fatal is not None:
            future.set_exception(self._sender.fatal)
        else:
            self._loop.call_soon_threadsafe(self._start, work, future)
        return future

    # ------------------------------------------------------------------------------------------------------- in the loop

    def _start(self, work: Callable[[], Coroutine[Any, Any, Any]], future: Future[Any]) -> None:
        if self._sender.fatal is not None:
            future.set_exception(self._sender.fatal)
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
        if self._sender.fatal is None:
            self._sender.fatal = error
        for future in self._pending:
            future.set_exception(self._sender.fatal)
        self._pending.clear()
        self._cancel_waiting()

    def _cancel_waiting(self) -> None:
        for task in self._tasks - self._sender.sending:
            if task is not asyncio.current_task():
                task.cancel()

    async def close(self, grace_seconds: float) -> None:
        """Send nothing more, await what is in flight for a while, then break its connections, so that it is written off."""
        self.end(EndpointError(f"{self.config.base_url}: the connection was closed"))
        if self._sender.sending:
            await asyncio.wait(self._sender.sending, timeout=grace_seconds)
        self._sender.client.abort()
        while others := self._tasks - {asyncio.current_task()}:
            self._cancel_waiting()
            await asyncio.wait(others, timeout=0.1)
        await self._sender.client.aclose()

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
            self._sender.count_replayed(1)
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
        self._sender.count_replayed(len(answers))
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
        received = await self._sender.send(request)
        pairs = zip(request.keys, received.answers, strict=True)
        return {key: answer for key, answer in pairs if answer is not None}

    # --------------------------------------------------------------------------------------------------------- preflight

    async def _find_out(self, sampling: Sampling, *, always: bool = False) -> Findings:
        """What the server supports: as configured, or asked once."""
        if self._findings is None:
            if not always and self.config.n is not None and self.config.seed is not None:
                return Findings(self.config.n, self.config.seed)
            if not always and (before := self._known.of_any_sampling(self.config)) is not None:
                return before
            self._findings = self._spawn(self._examine(sampling))
        return await asyncio.shield(self._findings)

    async def _examine(self, sampling: Sampling) -> Findings:
        if (before := self._known.of(self.config, sampling)) is not None:
            await confirm(self.config, sampling, before, self._ask)
            return before
        found = await examine(self.config, sampling, self._ask)
        self._known.add(self.config, sampling, found)
        return found

    async def _ask(self, probe: Probe) -> Received:
        """Send a probe: it is paid for, but its answers are not recorded."""
        body = request_body(self.config, probe.query)
        keys = tuple(draw_keys(self.config, replace(probe.query, draws=tuple(range(probe.n))), body))
        bound = upper_bound(self.config, probe.query, body, probe.n)
        bytes_sent = with_draws(body, probe.n if probe.n > 1 else None, probe.seed)
        return await self._spawn(self._sender.send(Request(keys, bytes_sent, bound, is_probe=True)))
