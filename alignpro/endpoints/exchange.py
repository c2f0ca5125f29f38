"""One request, and what is recorded of it: every purchase ends exactly once.

certainly not processed   no connection, 429, 408, 409, 425, 503 with Retry-After, any refusal   refunded
answered                  200 with choices; a refusal that depends on the text (an outcome)      settled
outcome unknown           reset, time-out, truncated or unreadable answer, other 5xx             written off
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from alignpro.config import EndpointConfig
from alignpro.endpoints.client import HttpClient, NotProcessedError, Reply, UnknownOutcomeError
from alignpro.endpoints.retry_after import retry_after
from alignpro.endpoints.types import Answer, Books, DrawKey, Purchase, Usage, Verdict
from alignpro.endpoints.wire import (
    ErrorInsideError,
    MalformedAnswerError,
    Received,
    error_code,
    excerpt,
    outcome_of,
    parse_json,
    read_answer,
)
from alignpro.errors import EndpointError

TRANSIENT = (408, 409, 425, 429)
"""Refusals that may pass."""
QUOTA = "insufficient_quota"
"""A 429 that does not pass: the account has no money left."""


class FailureError(Exception):
    """A request that failed in a way that may pass."""


class RefusalError(EndpointError):
    """A request that the server refuses, and will refuse again."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Request:
    """One request: the draws that it is for, its bytes, and the most that it can take."""

    keys: tuple[DrawKey, ...]
    body: bytes = field(repr=False)
    bound: Usage
    is_probe: bool = False
    """Whether its answers are looked at and not recorded."""
    check: Callable[[Any], object] | None = None
    """Of a server of any JSON: raises for an answer that is of no use, which is not recorded. None: it is a model's server."""


@dataclass(frozen=True)
class Bought:
    """What came of a request."""

    verdict: Verdict
    received: Received
    failure: str = ""
    """Why it must be repeated."""


class Exchange:
    """Requests to one server, each reserved before it is sent and settled after.

    Args:
        config: The server.
        client: Sends them.
        books: The ledger and the budget.
    """

    def __init__(self, config: EndpointConfig, client: HttpClient, books: Books) -> None:
        self._config, self._client, self._books = config, client, books

    async def send(self, purchase: Purchase, request: Request) -> Bought:
        """Send a request once, and end its purchase. Must not be cancelled.

        Raises:
            EndpointError: The server refuses it, or does not return as many choices as were asked for.
        """
        try:
            reply = await self._client.post(request.body)
        except NotProcessedError as error:
            await self._books.refund(purchase, str(error))
            return self._failed(str(error), Verdict("server_error", tokens=0))
        except UnknownOutcomeError as error:
            return await self._written_off(purchase, str(error))
        except BaseException:
            await self._books.write_off(purchase, "interrupted in flight")
            raise
        if reply.status == 200 and request.check is not None:
            return await self._answered_json(purchase, request.check, reply)
        if reply.status == 200:
            return await self._answered(purchase, request, reply)
        return await self._refused(purchase, request, reply)

    async def _answered(self, purchase: Purchase, request: Request, reply: Reply) -> Bought:
        n = len(request.keys)
        try:
            received = read_answer(reply.body, self._config.api, n)
        except ErrorInsideError as error:
            return await self._refused(purchase, request, replace(reply, status=error.status))
        except MalformedAnswerError as error:
            return await self._written_off(purchase, self._client.scrub(str(error)))
        answers: Sequence[Answer | None] = [None] * n if request.is_probe else received.answers
        recorded = await self._books.settle(purchase, answers, received.usage)
        verdict = Verdict("ok", None if received.usage is None else received.usage.total)
        if request.is_probe:
            return Bought(verdict, received)
        if received.choices != n:
            raise EndpointError(
                f"{self._who()}: {received.choices} choices came back for n={n}; what came is kept; "
                "if the server does not support it, set n: false"
            )
        received = replace(received, answers=recorded)
        if not any(recorded):
            return Bought(verdict, received, self._client.scrub(received.problem))
        return Bought(verdict, received)

    async def _answered_json(self, purchase: Purchase, check: Callable[[Any], object], reply: Reply) -> Bought:
        nothing = Usage(0, 0)
        try:
            document = parse_json(reply.body)
        except MalformedAnswerError as error:
            return await self._written_off(purchase, self._client.scrub(str(error)))
        try:
            check(document)
        except Exception:
            await self._books.settle(purchase, [None], nothing)
            raise
        recorded = await self._books.settle(purchase, [Answer(json.dumps(document), "stop")], nothing)
        return Bought(Verdict("ok", 0), Received(recorded, nothing, 1))

    async def _refused(self, purchase: Purchase, request: Request, reply: Reply) -> Bought:
        said = self._client.scrub(excerpt(reply.body))
        problem = f"the server answered {reply.status}: {said}" if said else f"the server answered {reply.status}"
        outcome = outcome_of(reply.status, reply.body)
        if outcome is not None and not request.is_probe:
            answers = [Answer("", outcome)] * len(request.keys)
            recorded = await self._books.settle(purchase, answers, Usage(0, 0))
            return Bought(Verdict("ok", 0), Received(recorded, Usage(0, 0), len(recorded)))
        wait = retry_after(reply.headers)
        if reply.status >= 500 or reply.status < 300:
            asked_to_wait = "retry-after" in reply.headers or "retry-after-ms" in reply.headers
            verdict = Verdict("server_error", retry_after=wait if asked_to_wait else None)
            if reply.status == 503 and asked_to_wait:
                await self._books.refund(purchase, problem)
                return self._failed(problem, replace(verdict, tokens=0))
            return await self._written_off(purchase, problem, verdict)
        await self._books.refund(purchase, problem)
        if reply.status in TRANSIENT and QUOTA not in error_code(reply.body):
            kind: Any = "throttled" if reply.status == 429 else "server_error"
            return self._failed(problem, Verdict(kind, tokens=0, retry_after=wait if reply.status == 429 else None))
        raise RefusalError(f"{self._who()}: {problem}{self._advice(reply)}", reply.status)

    async def _written_off(self, purchase: Purchase, problem: str, verdict: Verdict | None = None) -> Bought:
        await self._books.write_off(purchase, problem)
        return self._failed(problem, verdict or Verdict("server_error"))

    @staticmethod
    def _failed(problem: str, verdict: Verdict) -> Bought:
        return Bought(verdict, Received([], None, 0), problem)

    def _who(self) -> str:
        return f"{self._config.base_url}, model {self._config.model}"

    def _advice(self, reply: Reply) -> str:
        key = self._config.api_key_env
        if reply.status in (401, 403):
            return f"; the key is that of ${key}" if key else "; name the variable that holds the key in api_key_env"
        if 300 <= reply.status < 400:
            target = self._client.scrub(reply.headers.get("location", "nowhere"))
            return f"; it redirects to {excerpt(target.encode())}, which is not followed: if that is right, give it in base_url"
        if reply.status == 404:
            return "; check base_url and model"
        return ""
