"""The servers that components ask, as they see them; `alignpro.endpoints` is behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from alignpro.config import EndpointConfig
from alignpro.endpoints.types import Answer, Query, Sampling

T = TypeVar("T")


class Server(Protocol):
    """A server; see `alignpro.endpoints.endpoint.Endpoint`."""

    def submit(self, query: Query) -> Future[list[Answer]]:
        """Ask a language model for the draws of a query; returns at once."""

    def post(self, body: str, check: Callable[[Any], object]) -> Future[Answer]:
        """Send any JSON; the text of the answer is JSON for which ``check`` raises nothing. Returns at once."""

    def preflight(self, sampling: Sampling) -> object:
        """Check that a language model can be asked."""


class Session(Protocol):
    """The servers of a run, which share its ledger and its budget; see `alignpro.endpoints.session.EndpointSession`."""

    def endpoint(self, config: EndpointConfig, path: str | None = None) -> Server:
        """Connect to a server; of one of any JSON, ``path`` comes after its base URL."""


async def gather(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; after an error nothing more is begun."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
