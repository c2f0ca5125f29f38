"""What every request and answer gets: an id, the proxy's headers, errors in one form, counts, and a line in the log."""

from __future__ import annotations

import asyncio
import logging

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alignpro.serving.exchange import Exchange
from alignpro.serving.headers import REQUEST_ID, Headers, of_outcome
from alignpro.serving.refusals import Refusal, refusal_of_status
from alignpro.serving.relay import BrokenOff
from alignpro.serving.request_body import ClientGone
from alignpro.serving.service import Service

_LOGGER = logging.getLogger(__name__)
_LINGER_SECONDS = 30.0
"""How long a client may take to read what was sent before an answer broke off."""


class Frame:
    """The outermost application.

    Args:
        app: Finds an `Exchange` at ``scope["exchange"]``.
        service: Whose metrics and log are written.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange.of(scope["method"], scope["path"], scope["headers"])
        scope["exchange"], scope["app"] = exchange, self  # with an app, the router raises what it refuses

        async def framed(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_own_headers(exchange)]
            elif message["type"] == "http.response.body" and (body := message.get("body")):
                exchange.sent(len(body))
            await send(message)

        try:
            await self._app(scope, receive, framed)
        finally:
            self._service.metrics.count(exchange)
            self._service.log.write(exchange)
            self._service.recent.add(exchange)


def _own_headers(exchange: Exchange) -> Headers:
    own = [(REQUEST_ID, exchange.request_id.encode())]
    if exchange.outcome is not None:
        return own + of_outcome(exchange.outcome)
    if exchange.api is not None:
        own += [(b"x-alignpro-rewrite", b"skipped:refused"), (b"x-alignpro-ms", b"0.0")]
    return own


class Errors:
    """Makes answers of what the routes raise.

    Args:
        app: The routes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["exchange"]
        try:
            await self._app(scope, receive, send)
        except Refusal as refusal:
            await _refuse(exchange, refusal, send)
        except HTTPException as error:
            wrong = refusal_of_status(error.status_code)
            wrong.headers = [(key.lower().encode(), value.encode()) for key, value in (error.headers or {}).items()]
            await _refuse(exchange, wrong, send)
        except ClientGone:
            exchange.error = "client_gone"
        except BrokenOff as broken:
            _break_off(scope, at_once=broken.at_once)
        except asyncio.CancelledError:  # the server stops and waits no longer
            await _refuse(exchange, Refusal(503, "The proxy stops.", "stopping"), send)
        except Exception:
            _LOGGER.exception("request %s: an error of the proxy's own", exchange.request_id)
            had_begun = bool(exchange.status)
            await _refuse(exchange, Refusal(500, "The proxy failed: its log says why.", "internal_error"), send)
            if had_begun:  # otherwise the answer is whole, and the connection can be used again
                _break_off(scope, at_once=False)


async def _refuse(exchange: Exchange, refusal: Refusal, send: Send) -> None:
    """Answer with an error, if no answer has begun."""
    exchange.error = refusal.code
    if exchange.status:
        return
    body = refusal.body()
    kind = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": refusal.status, "headers": [*kind, *refusal.headers]})
    await send({"type": "http.response.body", "body": body})


def _break_off(scope: Scope, *, at_once: bool) -> None:
    """End the connection: the server closes it when the application returns without the answer's end."""
    abort = scope.get("state", {}).get("abort")
    if abort is None:  # under another server
        return
    if at_once:
        abort()
    else:
        asyncio.get_running_loop().call_later(_LINGER_SECONDS, abort)
