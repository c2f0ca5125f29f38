"""SIGTERM and SIGINT as a wish to stop, which a run grants when its state can be saved."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_signals(*, patience: float = 0.0) -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of dying; the second of a kind acts as usual.

    Args:
        patience: Seconds in which another of a kind is still the first: a scheduler signals a launcher and its ranks, and
            the launcher its ranks again.
    """
    received: list[int] = []
    first = time.monotonic()
    previous: dict[int, Any] = {}

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        if received and time.monotonic() < first + patience:
            return
        if received and patience:
            signal.signal(signum, previous[signum])
            os.kill(os.getpid(), signum)
            return
        first = time.monotonic()
        received.append(signum)
        if not patience:
            signal.signal(signum, previous[signum])
        # Not by logging: a handler may run amid another write to the same stream, which is no place to write again.
        with suppress(OSError):
            os.write(2, f"{signal.Signals(signum).name}: stopping after this step\n".encode())

    for signum in SIGNALS:
        previous[signum] = signal.signal(signum, handle)
    try:
        yield received
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
