"""The page at ``/``: its files, and what it asks of the proxy besides the API. Its script holds no rights of its own: it sends
the tokens that its user types."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from alignpro.errors import AlignProError
from alignpro.serving.exchange import Exchange
from alignpro.serving.headers import Headers, first
from alignpro.serving.refusals import Refusal
from alignpro.serving.request_body import read_body
from alignpro.serving.service import Service

if TYPE_CHECKING:
    from alignpro.serving.run_rewards import RunRewards

_KINDS = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
_INDEX = "index.html"
MOST_ANSWERS = 16
"""That are scored in one request."""
POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    b"form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Nothing but the package's own files is loaded or run, and text cannot become HTML."""
SECURITY: Headers = [
    (b"content-security-policy", POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


def page_routes(service: Service) -> list[Route]:
    """The routes of the page."""
    routes = [
        Route("/page/state", State(service), methods=["GET"]),
        Route("/page/requests", Requests(service), methods=["GET"]),
        Route("/page/rewards", Rewards(service), methods=["POST"]),
    ]
    for file in files("alignpro.serving").joinpath("page").iterdir():
        path = "/" if file.name == _INDEX else f"/page/{file.name}"
        routes.append(Route(path, PageFile(file.read_bytes(), _KINDS[Path(file.name).suffix]), methods=["GET"]))
    return routes


class PageFile:
    """A file of the page, from memory.

    Args:
        body: Its bytes.
        kind: Its content type.
    """

    def __init__(self, body: bytes, kind: bytes) -> None:
        self._body = body
        self._tag = b'"%b"' % sha256(body).hexdigest()[:32].encode()
        self._headers: Headers = [
            (b"content-type", kind),
            (b"cache-control", b"no-cache"),  # that is, ask whether it has changed
            (b"etag", self._tag),
            *SECURITY,
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["exchange"].route = "page"
        known = first(scope["headers"], b"if-none-match") or b""
        if self._tag in (tag.strip().removeprefix(b"W/") for tag in known.split(b",")):
            await send({"type": "http.response.start", "status": 304, "headers": self._headers[1:]})
            await send({"type": "http.response.body", "body": b""})
            return
        length = (b"content-length", b"%d" % len(self._body))
        await send({"type": "http.response.start", "status": 200, "headers": [*self._headers, length]})
        await send({"type": "http.response.body", "body": self._body})


async def _answer(send: Send, document: dict[str, Any]) -> None:
    body = json.dumps(document).encode()
    told = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    told += [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]
    await send({"type": "http.response.start", "status": 200, "headers": told})
    await send({"type": "http.response.body", "body": body})


class State:
    """What the page offers. It is told without a token, as `/ready` is."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["exchange"].route = "page"
        service, page = self._service, self._service.config.page
        recent = {"kept": page.recent_requests, "texts": page.recent_texts, "token": service.admin is not None}
        document = {
            "runs": list(service.rewriter.runs),
            "model": service.config.model,
            "token": service.tokens is not None or service.config.access.forward_authorization,
            "recent": recent if page.recent_requests else None,
            "rewards": page.rewards,
        }
        await _answer(send, document)


class Requests:
    """The last requests of all clients: for administrators, if there are any."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["exchange"].route = "page"
        if not self._service.config.page.recent_requests:
            raise Refusal(404, "No requests are kept: page.recent_requests is 0.", "not_kept")
        if self._service.admin is not None:
            self._service.admin.require(first(scope["headers"], b"authorization"))
        elif not _names_this_machine(first(scope["headers"], b"host")):
            raise Refusal(
                403,
                "Without access.admin_tokens_env the list is for this machine alone: open the page at 127.0.0.1.",
                "foreign_host",
            )
        await _answer(send, {"requests": self._service.recent.newest_first()})


def _names_this_machine(host: bytes | None) -> bool:
    """Whether a browser was sent to this machine's own name, not to one that a foreign page had point here."""
    name = re.sub(r":\d+$", "", (host or b"").decode("latin-1")).strip("[]")
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"


class Rewards:
    """Scores answers by the reward of a run."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._rewards: RunRewards | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["exchange"]
        exchange.route = "page"
        service = self._service
        if not service.config.page.rewards:
            raise Refusal(404, "Answers are not scored here: page.rewards is false.", "not_scored")
        headers = scope["headers"]
        if service.tokens is not None:
            service.tokens.require(first(headers, b"authorization"))
        with service.admission.presence():
            body = await read_body(receive, first(headers, b"content-length"), service.config.limits)
            exchange.bytes_in = len(body)
            run, prompt, answers = _read(body)
            path = next((path for path in service.run_paths if path.name == run), None)
            if path is None or run not in service.rewriter.runs:
                raise Refusal(404, "No run of this id is served: /ready lists them.", "run_not_found", "run")
            async with service.admission.place():
                try:
                    values = await self._loaded().score(path, prompt, answers)
                except AlignProError as error:
                    raise Refusal(422, str(error), "cannot_score") from error
        await _answer(send, {"rewards": values})

    def _loaded(self) -> RunRewards:
        if self._rewards is None:
            from alignpro.serving.run_rewards import RunRewards  # loads torch, as the runs have

            self._rewards = RunRewards()
        return self._rewards


def _read(body: bytes) -> tuple[str, str, Sequence[str]]:
    """Run, prompt and answers of a request."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "The body is not valid JSON.", "invalid_json") from None
    if not isinstance(document, dict):
        raise Refusal(400, "The body is not a JSON object.", "invalid_json")
    for name in ("run", "prompt"):
        if not isinstance(document.get(name), str):
            raise Refusal(400, f"{name}: expected a string.", "invalid_type", name)
    answers = document.get("answers")
    if not isinstance(answers, list) or not all(isinstance(each, str) for each in answers):
        raise Refusal(400, "answers: expected an array of strings.", "invalid_type", "answers")
    if not 1 <= len(answers) <= MOST_ANSWERS:
        raise Refusal(400, f"answers: expected 1 to {MOST_ANSWERS} of them.", "invalid_length", "answers")
    return document["run"], document["prompt"], answers
