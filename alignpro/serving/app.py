"""The routes of the proxy, as a pure ASGI application: what comes is relayed, and nothing hides a client's disconnect."""

from __future__ import annotations

import json
import re
import time
from hashlib import sha256
from typing import Any
from urllib.parse import unquote

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from alignpro.errors import AlignProError
from alignpro.serving import headers, metrics
from alignpro.serving.authentication import bearer_token
from alignpro.serving.client_watch import ClientWatch
from alignpro.serving.contract import Api, Asked, Outcome, TargetRequest
from alignpro.serving.exchange import Exchange
from alignpro.serving.frame import Errors, Frame
from alignpro.serving.headers import Headers, first
from alignpro.serving.openapi import openapi_document
from alignpro.serving.page_routes import page_routes
from alignpro.serving.refusals import Refusal
from alignpro.serving.relay import Given, Relay
from alignpro.serving.request_body import Document, Wishes, decompress, parse, read_body
from alignpro.serving.service import Service

_PREFIX = b"/v1"
_REWRITTEN = ("/v1/chat/completions", "/v1/completions")
_PRINTABLE = re.compile(rb"[!-~]*")
_TRUE = (b"1", b"true", b"yes")
_EXPOSED = [
    "x-request-id",
    "x-upstream-request-id",
    "x-alignpro-rewrite",
    "x-alignpro-rewrite-hash",
    "x-alignpro-run",
    "x-alignpro-ms",
    "x-alignpro-rewritten",
    "retry-after",
]


def build_app(service: Service) -> ASGIApp:
    """The application of a service."""
    routes = [
        Route("/v1/chat/completions", Rewritten(service, "chat", b"/chat/completions"), methods=["POST"]),
        Route("/v1/completions", Rewritten(service, "completions", b"/completions"), methods=["POST"]),
        Route("/v1/{rest:path}", Passed(service)),
        Route("/health", Health(), methods=["GET"]),
        Route("/ready", Ready(service), methods=["GET"]),
        Route("/metrics", ShownMetrics(service), methods=["GET"]),
        Route("/openapi.json", OpenAPI(), methods=["GET"]),
    ]
    if service.config.page.enabled:
        routes += page_routes(service)
    if service.admin is not None:
        routes.append(Route("/admin/reload", Reload(service), methods=["POST"]))
    app: ASGIApp = Errors(Router(routes, redirect_slashes=False))
    if service.config.listen.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=service.config.listen.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
    return Frame(app, service)


class _Forwarding:
    """What routes to the target have in common."""

    def __init__(self, service: Service) -> None:
        self._service = service
        config = service.config
        forwarded = {name.encode() for name in config.forward_headers}
        if config.access.forward_authorization:
            forwarded |= headers.OF_CLIENTS_KEY
        self._forwarded = headers.TO_TARGET | forwarded
        self._returned = headers.TO_CLIENT | {name.encode() for name in config.return_headers}

    def _authenticate(self, scope: Scope) -> None:
        if self._service.tokens is not None:
            self._service.tokens.require(first(scope["headers"], b"authorization"))

    def _require_model(self, named: Any) -> None:
        """Refuse another model than the one that is served, if that is the only one."""
        only = self._service.target.model
        if only is not None and named not in (None, only):
            raise Refusal(404, f"The model is not served: ask for {only}.", "model_not_found", "model")

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        exchange: Exchange = scope["exchange"]
        declared = first(scope["headers"], b"content-length")
        body = await read_body(receive, declared, self._service.config.limits)
        exchange.bytes_in = len(body)
        return body

    def _request(self, scope: Scope, path: bytes, body: bytes, more: Headers) -> TargetRequest:
        query = scope["query_string"]
        whole = path + b"?" + query if query else path
        if not _PRINTABLE.fullmatch(whole):
            raise Refusal(400, "The path holds characters that are not printable ASCII.", "invalid_path")
        told = headers.to_target(scope["headers"], self._forwarded)
        told += [(headers.REQUEST_ID, scope["exchange"].request_id.encode()), *more]
        return TargetRequest(scope["method"], whole.decode(), tuple(told), body)

    def _relay(self, scope: Scope, watch: ClientWatch, send: Send, given: Given) -> Relay:
        service = self._service
        return Relay(service.target, service.config.limits, self._returned, scope["exchange"], watch, send, given)


class Rewritten(_Forwarding):
    """A route whose prompts may be rewritten.

    Args:
        service: The proxy's parts.
        api: Which of OpenAI's APIs it is.
        path: Of the target's route, below its base URL.
    """

    def __init__(self, service: Service, api: Api, path: bytes) -> None:
        super().__init__(service)
        self._api, self._path = api, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["exchange"]
        exchange.api, exchange.route = self._api, self._api
        self._authenticate(scope)
        with self._service.admission.presence():
            body = await self._read(scope, receive)
            encoding = (first(scope["headers"], b"content-encoding") or b"").strip().lower()
            document = parse(decompress(body, encoding, self._service.config.limits), self._api)
            wishes = self._wishes(scope, document)
            self._note(scope, document)
            with ClientWatch(receive) as watch:
                began = time.perf_counter()
                async with self._service.admission.place():
                    exchange.phases["queue"] = time.perf_counter() - began
                    outcome = await self._rewrite(exchange, document, wishes)
                    request = self._request(scope, self._path, outcome.body, [])
                    given = _given(outcome, wishes)
                    if given.value is not None:  # the answer must be readable
                        kept = (each for each in request.headers if each[0] != b"accept-encoding")
                        request = TargetRequest(request.method, request.path, tuple(kept), request.body)
                    await self._relay(scope, watch, send, given).run(request)

    def _wishes(self, scope: Scope, document: Document) -> Wishes:
        told = scope["headers"]
        run, opt_out = document.wishes.run, document.wishes.opt_out
        if run is None and (named := first(told, headers.RUN)) is not None:
            run = unquote(named.decode("latin-1"))
        if run is not None and run not in self._service.rewriter.runs:
            raise Refusal(404, "No run of this id is served: /ready lists them.", "run_not_found", "alignpro.run")
        opt_out = opt_out or (first(told, headers.OPT_OUT) or b"").strip().lower() in _TRUE
        return Wishes(run, opt_out, document.wishes.give)

    def _note(self, scope: Scope, document: Document) -> None:
        exchange: Exchange = scope["exchange"]
        exchange.model, exchange.is_stream = document.body.get("model"), bool(document.body.get("stream"))
        self._require_model(exchange.model)
        user = (document.body.get("user") or "").encode("utf-8", "surrogatepass")
        user = user or bearer_token(first(scope["headers"], b"authorization"))
        exchange.user = sha256(user).hexdigest()[:32] if user else None

    async def _rewrite(self, exchange: Exchange, document: Document, wishes: Wishes) -> Outcome:
        asked = Asked(
            api=self._api,
            body=document.body,
            raw=document.raw,
            request_id=exchange.request_id,
            user=exchange.user,
            run=wishes.run,
            opt_out=wishes.opt_out,
        )
        if self._service.target.refuses(self._api, document.raw):
            outcome = Outcome(document.raw, "refused")
        else:
            outcome = await self._service.rewriter.rewrite(asked)
        exchange.outcome = outcome
        exchange.phases["rewrite"] = outcome.seconds
        if outcome.later is not None:
            note = self._service.note_later
            outcome.later.add_done_callback(lambda done: note(exchange.request_id, outcome.skipped, done.result()))
        return outcome


def _given(outcome: Outcome, wishes: Wishes) -> Given:
    """What is given back of a rewrite, as the client wishes."""
    if wishes.give is None:
        return Given()
    header = [] if outcome.rewrite is None else headers.rewritten(outcome.rewrite)
    if wishes.give == "header":
        return Given(header=header)
    told: dict[str, Any] = {"rewrite": outcome.rewrite, "applied": outcome.skipped is None, "skipped": outcome.skipped}
    told |= {"run": outcome.run, "ms": round(1000 * outcome.seconds, 1)}
    return Given(json.dumps(told).encode(), header)


class Passed(_Forwarding):
    """All other routes of the target: requests and answers as they are."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["exchange"]
        path: bytes = scope["raw_path"]
        segments = re.split(r"[/\\]", scope["path"])
        if not path.startswith(_PREFIX + b"/") or ".." in segments or "." in segments:
            raise Refusal(404, "There is nothing at this path.", "not_found")
        if scope["path"].rstrip("/") in _REWRITTEN:  # some servers take it for the route that is rewritten
            raise Refusal(404, "There is nothing at this path: it has no slash at its end.", "not_found")
        exchange.route = "models" if scope["path"] == "/v1/models" else "passed"
        self._authenticate(scope)
        with self._service.admission.presence():
            body = await self._read(scope, receive)
            encoding = first(scope["headers"], b"content-encoding")
            self._check_model(body, encoding)
            more = [] if encoding is None else [(b"content-encoding", encoding)]
            request = self._request(scope, path.removeprefix(_PREFIX), body, more)
            with ClientWatch(receive) as watch:
                async with self._service.admission.place():
                    await self._relay(scope, watch, send, Given()).run(request)

    def _check_model(self, body: bytes, encoding: bytes | None) -> None:
        """Refuse a request in JSON for another model than the one that is served."""
        if self._service.target.model is None or not body:
            return
        plain = decompress(body, (encoding or b"").strip().lower(), self._service.config.limits)
        try:
            asked = json.loads(plain)
        except (ValueError, RecursionError):
            return  # a file that is sent, for example: it is the target's to say
        self._require_model(asked.get("model") if isinstance(asked, dict) else None)


async def _answer(send: Send, status: int, body: bytes, kind: bytes = b"application/json") -> None:
    told = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": told})
    await send({"type": "http.response.body", "body": body})


class Health:
    """The process answers."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["exchange"].route = "health"
        await _answer(send, 200, b'{"status": "ok"}')


class Ready:
    """Whether requests can be served."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["exchange"].route = "ready"
        readiness = await self._service.readiness()
        await _answer(send, 200 if readiness.is_ready else 503, json.dumps(readiness.document()).encode())


class ShownMetrics:
    """The metrics."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["exchange"].route = "metrics"
        await _answer(send, 200, self._service.metrics.text(), metrics.CONTENT_TYPE)


class OpenAPI:
    """The description of these routes."""

    def __init__(self) -> None:
        self._body = json.dumps(openapi_document()).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["exchange"].route = "openapi"
        await _answer(send, 200, self._body)


class Reload:
    """Serves the runs and tokens of the configuration as it is now."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["exchange"].route = "reload"
        assert self._service.admin is not None  # or there would be no route; a reload does not take it away
        self._service.admin.require(first(scope["headers"], b"authorization"))
        try:
            runs = await self._service.reload()
        except AlignProError as error:
            raise Refusal(409, f"Nothing has changed: {error}", "reload_failed") from error
        await _answer(send, 200, json.dumps({"runs": list(runs)}).encode())
