"""The servers that components ask, as they see them; `alignpro.endpoints` is behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from alignpro.config import EndpointConfig
from alignpro.endpoints.types import Answer, Query, Sampling

T = TypeVar("T")


class ModelServer(Protocol):
    """A language model behind a server."""

    def submit(self, query: Query) -> Future[list[Answer]]:
        """Ask for the draws of a query; returns at once."""

    def preflight(self, sampling: Sampling) -> object:
        """Check that the server can be used."""


class Session(Protocol):
    """The servers of a run, which share its ledger and its budget."""

    def endpoint(self, config: EndpointConfig) -> ModelServer:
        """Connect to a language model."""


async def gather(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; after an error nothing more is begun."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
