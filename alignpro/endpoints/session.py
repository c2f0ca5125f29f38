"""All servers of a run: one thread with an event loop, in which their requests run while the run computes."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Any, Self, TypeVar

from tenacity.wait import wait_base

from alignpro.config import EndpointConfig
from alignpro.endpoints.endpoint import Endpoint
from alignpro.endpoints.known_servers import KnownServers
from alignpro.endpoints.limits import RateLimits
from alignpro.endpoints.sender import BACKOFF
from alignpro.endpoints.types import Books, Limits
from alignpro.errors import AlignProError, EndpointError

T = TypeVar("T")

GRACE_SECONDS = 5.0
"""For which requests in flight are awaited when the session is closed; then they are written off."""
PAID_SECONDS = 60.0
"""Likewise after an error: their answers are paid for and recorded, so that a run that goes on finds them."""


def _set_aside_what_exists() -> None:
    """Take the imported libraries out of the garbage collector's sight, once in a process.

    Every answer makes objects, so the collector runs often; looking through torch and transformers each time costs the client a
    fifth of its answers per second.
    """
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


class EndpointSession:
    """Opens endpoints, and closes them. An interrupt in the main thread closes it too, by the end of the ``with``.

    Args:
        books: The ledger and the budget, which all endpoints share; or a context that is entered in the session's thread, in
            which they are used, and left once all endpoints are closed.
        limits: From a configuration to the limits of its server; by default limits of this process.
        backoff: How long an endpoint waits before it repeats a request.
        known: What was found of servers before; what is found is added.
    """

    def __init__(
        self,
        books: Books | AbstractAsyncContextManager[Books],
        limits: Callable[[EndpointConfig], Limits] = RateLimits.of,
        backoff: wait_base = BACKOFF,
        known: KnownServers | None = None,
    ) -> None:
        self.known = known or KnownServers()
        """What was found of servers; an endpoint that is opened twice is examined once."""
        self._new_limits, self._backoff = limits, backoff
        self._limits: dict[tuple[str, str | None, str], Limits] = {}
        self._endpoints: list[Endpoint] = []
        self._is_closed = False
        _set_aside_what_exists()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="endpoints", daemon=True)
        self._thread.start()
        self._context = AsyncExitStack()
        try:
            if isinstance(books, AbstractAsyncContextManager):
                books = self.call(self._context.enter_async_context(books))
        except BaseException:
            self._stop()
            raise
        self._books: Books = books

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something in the session's thread, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def endpoint(self, config: EndpointConfig, path: str | None = None) -> Endpoint:
        """Open a server. Endpoints with the same URL, key and model share their limits, those of the first of them.

        Args:
            config: The server.
            path: Of a server of any JSON, what comes after the base URL.

        Raises:
            EndpointError: A variable of the environment is not set, or the certificates cannot be read.
        """
        if self._is_closed:
            raise EndpointError(f"{config.base_url}: the session was closed")
        group = (config.base_url, config.api_key_env, config.model)
        if group not in self._limits:
            self._limits[group] = self._new_limits(config)
        endpoint = Endpoint(config, self._books, self._limits[group], self.loop, self._backoff, path, self.known)
        self._endpoints.append(endpoint)
        return endpoint

    def close(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Fail what waits, await what is in flight for a while, write off the rest, and stop the thread."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self.call(self._close(grace_seconds))
        finally:  # also if a second interrupt comes meanwhile
            self._stop()

    async def _close(self, grace_seconds: float) -> None:
        async with self._context:
            await asyncio.gather(*(endpoint.close(grace_seconds) for endpoint in self._endpoints))

    def _stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(PAID_SECONDS if isinstance(error, AlignProError) else GRACE_SECONDS)
