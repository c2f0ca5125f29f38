"""Passes a request to the target, and the bytes of its answer to the client as they come."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field

from starlette.types import Send

from alignpro.config import ServeLimitsConfig
from alignpro.serving.client_watch import ClientWatch
from alignpro.serving.contract import ServedTarget, TargetFailure, TargetRequest, TargetResponse
from alignpro.serving.exchange import Exchange
from alignpro.serving.headers import Headers, first, to_client
from alignpro.serving.refusals import Refusal
from alignpro.serving.request_body import FIELD

_TAIL = 4096
"""Bytes at the end of an answer in which the target's count of tokens is looked for."""
_USAGE = re.compile(rb'(?<!\\)"(prompt|completion)_tokens"\s*:\s*(\d{1,15})')


class BrokenOff(Exception):  # noqa: N818
    """The answer has begun and cannot be completed: the connection to the client is closed without its end.

    Args:
        at_once: Drop what the client has not taken: it takes nothing.
    """

    def __init__(self, *, at_once: bool) -> None:
        super().__init__()
        self.at_once = at_once


@dataclass(frozen=True)
class Given:
    """A rewrite that is given back: in a whole answer of JSON as a field, else in a header."""

    value: bytes | None = None
    """JSON for the field ``alignpro``; None puts it into the header always."""
    header: Headers = field(default_factory=list)


class _Clock:
    """The limits on one answer: idle and total."""

    def __init__(self, limits: ServeLimitsConfig) -> None:
        self._idle = limits.idle_seconds
        self._loop = asyncio.get_running_loop()
        now = self._loop.time()
        self._end = now + limits.total_seconds
        self.timeout = asyncio.timeout_at(min(now + self._idle, self._end))

    def tick(self) -> None:
        """Something has moved."""
        self.timeout.reschedule(min(self._loop.time() + self._idle, self._end))


class Relay:
    """One request's way to the target and back.

    Args:
        target: Where it goes.
        limits: Of its time.
        returned: Names of the target's headers that the client gets.
        exchange: What is found out is written there.
        watch: Is told before the answer ends.
        send: Of ASGI.
        given: The rewrite, if the client asked for it.
    """

    def __init__(
        self,
        target: ServedTarget,
        limits: ServeLimitsConfig,
        returned: Collection[bytes],
        exchange: Exchange,
        watch: ClientWatch,
        send: Send,
        given: Given,
    ) -> None:
        self._target, self._limits, self._returned = target, limits, returned
        self._exchange, self._watch, self._send, self._given = exchange, watch, send, given
        self._clock = _Clock(limits)
        self._response: TargetResponse | None = None
        self._is_sending = False
        self._takes_events = False
        """Whether an error can be told in the body that has begun."""
        self._tail = b""

    async def run(self, request: TargetRequest) -> None:
        """Send the request, and pass the answer on until its end.

        Raises:
            Refusal: The target did not begin to answer: 502 or 504.
            BrokenOff: It did not complete its answer, and only the end of the connection can tell.
        """
        try:
            async with self._clock.timeout:
                response = await self._begin(request)
                if self._takes_field(response):
                    await self._pass_with_field(response)
                else:
                    await self._pass(response, response.chunks(), is_head=request.method == "HEAD")
        except TargetFailure as failure:
            self._exchange.detail = repr(failure.__cause__ or failure)
            status, code = (504, "target_timeout") if failure.timeout else (502, "target_failed")
            await self._fail(Refusal(status, str(failure), code))
        except TimeoutError:
            await self._fail(Refusal(504, "The target did not answer in time.", "target_timeout"))
        except asyncio.CancelledError:
            if not self._watch.is_gone:
                await self._fail(Refusal(503, "The proxy stops.", "stopping"))
            raise
        finally:
            if self._response is not None:
                await self._response.close()
            self._count_tokens()

    async def _begin(self, request: TargetRequest) -> TargetResponse:
        began = time.perf_counter()
        try:
            self._response = await self._target.send(request)
        finally:
            self._exchange.phases["target"] = time.perf_counter() - began
        self._clock.tick()
        return self._response

    async def _fail(self, refusal: Refusal) -> None:
        """Tell the client as well as it can still be told."""
        if not self._exchange.status:
            raise refusal
        self._exchange.error = refusal.code
        if self._is_sending or not self._takes_events:
            raise BrokenOff(at_once=self._is_sending)
        between = b"" if not self._tail or self._tail.endswith((b"\n\n", b"\r\n\r\n")) else b"\n\n"
        event = between + b"data: " + refusal.body() + b"\n\n"
        self._watch.finish()
        await self._send({"type": "http.response.body", "body": event, "more_body": False})

    async def _start(self, response: TargetResponse, more: Headers, *, same_body: bool) -> None:
        kept = to_client(response.headers, self._returned, same_body=same_body)
        await self._send({"type": "http.response.start", "status": response.status, "headers": kept + more})

    async def _pass(
        self, response: TargetResponse, chunks: AsyncIterator[bytes], gathered: bytes = b"", *, is_head: bool = False
    ) -> None:
        kind = _value(response, b"content-type")
        is_events = kind.startswith(b"text/event-stream")
        self._takes_events = is_events and not _value(response, b"content-encoding")
        await self._start(response, self._given.header, same_body=not self._takes_events)
        has_body = not is_head and response.status not in (204, 304)
        length = int(_value(response, b"content-length") or -1) if has_body and not self._takes_events else -1
        if gathered:
            await self._forward(gathered)
        passed, more = len(gathered), True
        async for chunk in chunks:
            passed += len(chunk)
            self._clock.tick()
            if passed == length:
                self._watch.finish()
                more = False
            await self._forward(chunk, more=more)
        if more:
            self._watch.finish()
            await self._forward(b"", more=False)

    async def _forward(self, chunk: bytes, *, more: bool = True) -> None:
        if chunk:
            self._tail = chunk[-_TAIL:] if len(chunk) >= _TAIL else (self._tail + chunk)[-_TAIL:]
        self._is_sending = True
        await self._send({"type": "http.response.body", "body": chunk, "more_body": more})
        self._is_sending = False

    def _takes_field(self, response: TargetResponse) -> bool:
        return (
            self._given.value is not None
            and response.status == 200
            and _value(response, b"content-type").startswith(b"application/json")
            and not _value(response, b"content-encoding")
        )

    async def _pass_with_field(self, response: TargetResponse) -> None:
        """Put the field into the answer, which is read whole for that; too large a one passes as it is."""
        chunks = response.chunks()
        parts: list[bytes] = []
        size = 0
        async for chunk in chunks:
            self._clock.tick()
            parts.append(chunk)
            size += len(chunk)
            if size > self._limits.answer_bytes:
                await self._pass(response, chunks, b"".join(parts))
                return
        body = b"".join(parts).strip()
        assert self._given.value is not None
        if body.startswith(b"{") and body.endswith(b"}"):
            comma = b"" if not body[1:-1].strip() else b","
            body = body[:-1] + comma + b'"%b":%b}' % (FIELD.encode(), self._given.value)
        length = (b"content-length", b"%d" % len(body))
        await self._start(response, [length], same_body=False)
        self._watch.finish()
        await self._forward(body, more=False)

    def _count_tokens(self) -> None:
        for kind, count in _USAGE.findall(self._tail):
            self._exchange.tokens[kind.decode()] = int(count)


def _value(response: TargetResponse, name: bytes) -> bytes:
    """A header of the target, in lower case; empty without it."""
    return (first(((key.lower(), value) for key, value in response.headers), name) or b"").lower()
