"""SIGINT for a command: the first one interrupts it, another one during its clean-up ends it at once and quietly."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 128 + signal.SIGINT
"""The exit status that a shell reports for a process killed by SIGINT."""


@contextmanager
def quiet_interrupts() -> Iterator[None]:
    """Raise `KeyboardInterrupt` at the first SIGINT, and end the process at the next one.

    The second one may come at any moment, when nothing may be there to catch an exception. Files are written so that they
    survive it. Where another handler than Python's own is installed, or outside the main thread, nothing changes.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    interrupted = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            os._exit(EXIT_CODE)
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        # After an interrupt the process ends: another one would meet the interpreter's own clean-up.
        signal.signal(signal.SIGINT, signal.SIG_IGN if interrupted else signal.default_int_handler)


@contextmanager
def exit_at_interrupt() -> Iterator[None]:
    """End the process at SIGINT, quietly: while modules are loaded nothing is at stake, and an exception may be lost there."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) in (
        None,
        signal.SIG_IGN,
    ):
        yield
        return
    before = signal.signal(signal.SIGINT, lambda signum, frame: os._exit(EXIT_CODE))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
