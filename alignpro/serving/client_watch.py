"""Ends the work on a request when its client disconnects."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Receive

from alignpro.serving.request_body import ClientGone


class ClientWatch:
    """Within it, a disconnect cancels what the task is waiting for, and `ClientGone` is raised.

    Args:
        receive: Of ASGI, after the whole body has been received: what comes next is the disconnect.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.is_gone = False
        self._is_over = False

    async def _watch(self, owner: asyncio.Task[None]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._is_over:
            self.is_gone = True
            owner.cancel()

    def finish(self) -> None:
        """Stop watching: the end of the answer looks like a disconnect."""
        self._is_over = True

    def __enter__(self) -> ClientWatch:
        owner = asyncio.current_task()
        assert owner is not None
        self._owner = owner
        self._task = asyncio.create_task(self._watch(owner))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish()
        self._task.cancel()
        # The cancellation is always delivered here: the task waits somewhere within while the watch runs.
        if self.is_gone and self._owner.uncancel() == 0 and kind is asyncio.CancelledError:
            raise ClientGone from None
