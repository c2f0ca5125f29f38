"""What the sides of the proxy promise each other: HTTP, the rewriting of a request's prompt, and the target."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Api = Literal["chat", "completions"]


@dataclass(frozen=True)
class Asked:
    """A request whose prompt may be rewritten."""

    api: Api
    body: Mapping[str, Any]
    """The parsed JSON object."""
    raw: bytes
    """The same as it came, decompressed."""
    request_id: str
    user: str | None = None
    """Whom a canary's share is sticky to: the body's ``user`` or the client's bearer token, hashed."""
    run: str | None = None
    """The run that the client chose, of those that are served; None leaves it to the proxy."""
    opt_out: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a request's prompt."""

    body: bytes
    """What is sent to the target: ``raw``, byte for byte, if nothing is rewritten; else ``raw`` with the text alone replaced.

    Earlier turns that were rewritten stay rewritten, so this can differ from ``raw`` though the last turn was skipped."""
    skipped: str | None
    """Why the original is sent (a word such as ``deadline`` or ``guard:numbers``); None if the rewrite is."""
    original: str | None = None
    """The text that could be rewritten; None if the request has none."""
    rewrite: str | None = None
    """The rewrite, also of a skip that came after it (shadow mode, a guard)."""
    run: str | None = None
    """The run whose prompter wrote it."""
    seconds: float = 0.0
    """Spent on it, waiting included."""
    details: Mapping[str, float] | None = None
    """Further measures by name, for metrics and logs."""
    later: asyncio.Future[Outcome] | None = None
    """In shadow mode, and for users out of a canary's share, what becomes of a rewrite that the request need not wait for. It
    never raises. Its ``skipped`` is that of this outcome if the rewrite could have been used."""


class RequestRewriter(Protocol):
    """Rewrites the prompts of requests. It never raises for a request: whatever goes wrong is a reason to skip."""

    @property
    def runs(self) -> tuple[str, ...]:
        """The ids of the runs that are served, the default first; empty while none is loaded."""

    async def rewrite(self, asked: Asked) -> Outcome:
        """What to send to the target. Cancelling the call ends the work on it at once."""

    async def close(self) -> None:
        """End it; unfinished rewrites are skipped."""


@dataclass(frozen=True)
class TargetRequest:
    """A request as it is sent to the target."""

    method: str
    path: str
    """With the query, below the target's base URL: ``/chat/completions``."""
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class TargetResponse(Protocol):
    """A response that has begun."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> tuple[tuple[bytes, bytes], ...]: ...

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes.

        Raises:
            TargetFailure: It broke off.
        """

    async def close(self) -> None:
        """Let go of it, and cancel what is not finished."""


class TargetFailure(Exception):  # noqa: N818
    """The target cannot be reached, or broke off; the message is for the client and names no secret."""

    def __init__(self, message: str, *, timeout: bool = False) -> None:
        super().__init__(message)
        self.timeout = timeout


class ServedTarget(Protocol):
    """The target that requests are passed to: a server, or a model in this process."""

    @property
    def model(self) -> str | None:
        """The only model that may be asked for; None if the target is the one to say."""

    def refuses(self, api: Api, body: bytes) -> bool:
        """Whether it is known that a request will be refused, without sending it: nothing is rewritten for it then."""

    async def send(self, request: TargetRequest) -> TargetResponse:
        """Send a request, and wait for the head of the response. Cancelling the call cancels the request.

        Raises:
            TargetFailure: No response began.
        """

    async def reachable(self) -> str | None:
        """None if it answers, else why not."""

    async def close(self) -> None:
        """Disconnect."""
