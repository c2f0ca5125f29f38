"""SIGTERM and SIGINT as requests to stop, which a run follows as soon as its state can be saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_signals(*, patience: float = 0.0) -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of dying; a second signal of the same kind has its usual effect.

    In a thread other than the main one, which alone receives signals, nothing changes and the list stays empty.

    Args:
        patience: Seconds after the first signal in which further ones are ignored: a scheduler signals a launcher and its
            ranks, and the launcher signals its ranks again.
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
        # Not by logging: the handler may interrupt another write to the same stream, and streams are not reentrant.
        with suppress(OSError):
            os.write(2, f"{signal.Signals(signum).name}: stopping after this step\n".encode())

    for signum in SIGNALS if threading.current_thread() is threading.main_thread() else ():
        previous[signum] = signal.signal(signum, handle)
    try:
        yield received
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
