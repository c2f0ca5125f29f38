"""A transport that joins what is written in one turn of the event loop: head, body and end of an answer leave in one packet."""

from __future__ import annotations

import asyncio
from typing import Any


class CorkedTransport(asyncio.Transport):
    """A transport over another one.

    Args:
        inner: What sends and receives.
        loop: The event loop.
    """

    def __init__(self, inner: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._inner, self._loop = inner, loop
        self._unsent: list[bytes] = []

    def write(self, data: Any) -> None:
        """Send this at the end of the turn."""
        if data:
            if not self._unsent:
                self._loop.call_soon(self._flush)
            self._unsent.append(data)

    def _flush(self) -> None:
        if self._unsent:
            joined = self._unsent[0] if len(self._unsent) == 1 else b"".join(self._unsent)
            self._unsent.clear()
            self._inner.write(joined)

    def close(self) -> None:
        """Send what is unsent, and close."""
        self._flush()
        self._inner.close()

    def abort(self) -> None:
        """Close without sending."""
        self._unsent.clear()
        self._inner.abort()

    def is_closing(self) -> bool:
        return self._inner.is_closing()

    def get_write_buffer_size(self) -> int:
        return self._inner.get_write_buffer_size() + sum(map(len, self._unsent))

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._inner.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._inner.pause_reading()

    def resume_reading(self) -> None:
        self._inner.resume_reading()
