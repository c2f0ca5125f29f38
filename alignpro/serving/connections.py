"""Connections of clients, as uvicorn serves them, with limits on those that send or take too slowly.

uvicorn limits neither the time in which the head of a request comes, nor how long a client may take to read an answer; and
what is no HTTP it answers in a form of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from alignpro.config import ServeLimitsConfig
from alignpro.serving.corked_transport import CorkedTransport
from alignpro.serving.exchange import new_request_id
from alignpro.serving.refusals import Refusal


def limited_protocol(limits: ServeLimitsConfig, count_refused: Callable[[str], None]) -> type[H11Protocol]:
    """The protocol for uvicorn's ``http``.

    Args:
        limits: Of time and number.
        count_refused: Is told why a connection ended before a request.
    """

    class LimitedProtocol(H11Protocol):
        _arrival: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(CorkedTransport(transport, self.loop))
            if len(self.connections) > limits.connections:
                count_refused("too_many")
                transport.abort()
                return
            self.app_state = {**self.app_state, "abort": transport.abort}
            self._expect(limits.header_seconds)

        def connection_lost(self, exc: Exception | None) -> None:
            self._expect(None)
            self._unset_keepalive_if_required()  # of a connection that was reset, uvicorn would keep it
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            state = self.conn.their_state
            if state is h11.SEND_BODY:
                if self._arrival is None or self._is_head_awaited:
                    self._expect(limits.body_seconds, of_body=True)
            elif state is not h11.IDLE:
                self._expect(None)
            elif self._arrival is None and self._has_part_of_head():
                self._expect(limits.header_seconds)

        def _has_part_of_head(self) -> bool:
            return bool(self.conn.trailing_data[0])

        def _expect(self, seconds: float | None, *, of_body: bool = False) -> None:
            """Await a head or a body until then; None ends it."""
            if self._arrival is not None:
                self._arrival.cancel()
            self._is_head_awaited = not of_body
            self._arrival = None if seconds is None else self.loop.call_later(seconds, self._is_late)

        def _is_late(self) -> None:
            self._arrival = None
            if self.transport.is_closing():
                return
            if self.cycle is not None and not self.cycle.response_complete:
                return  # the application waits for this body, with the same limit
            count_refused("late")
            if self._is_head_awaited and self._has_part_of_head():
                self._refuse(Refusal(408, "The head of the request did not come in time.", "request_timeout"))
            else:
                self.transport.abort()

        def send_400_response(self, msg: str) -> None:
            count_refused("invalid")
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self._refuse(Refusal(400, "The request is not valid HTTP.", "invalid_http"))
            else:  # in the middle of an answer
                self.transport.close()

        def _refuse(self, refusal: Refusal) -> None:
            body = refusal.body()
            told: list[tuple[bytes, bytes]] = [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                (b"connection", b"close"),
                (b"x-request-id", new_request_id().encode()),
            ]
            events: list[Any] = [h11.Response(status_code=refusal.status, headers=told), h11.Data(data=body)]
            for event in [*events, h11.EndOfMessage()]:
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def timeout_keep_alive_handler(self) -> None:
            if self.transport.get_write_buffer_size():  # the client takes nothing: a plain close would wait for it
                self.transport.abort()
            else:
                super().timeout_keep_alive_handler()

    return LimitedProtocol
