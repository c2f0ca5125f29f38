"""A command of `alignpro` in a process of its own, which ends with this one and passes its output to a file."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

SECONDS_BETWEEN_LOOKS = 0.2
_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

THIS_PYTHON = (sys.executable, "-m")
"""Starts a module in one process."""


def run_command(starter: Sequence[str], arguments: Sequence[str], log: Path, stopped: Callable[[], int | None]) -> int:
    """Run ``alignpro`` to its end and return its exit status, negative after a signal.

    Args:
        starter: What starts a module and ends with an option for its name, such as `THIS_PYTHON`.
        arguments: The arguments of ``alignpro``.
        log: File to which its output is appended.
        stopped: Returns a signal once this process was asked to stop. The command is then sent a SIGTERM, at which a
            training saves its state.

    Raises:
        OSError: The command cannot be started, or the file not be written.
    """
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*starter, "alignpro", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process only, which passes it on
            preexec_fn=end_with_parent,
        )
        try:
            while process.poll() is None and stopped() is None:
                _wait(process)
            if process.poll() is None:
                signal_session(process.pid, signal.SIGTERM)
            return process.wait()
        finally:
            if process.poll() is None:  # a second signal: nothing is waited for
                signal_session(process.pid, signal.SIGKILL)
                process.wait()


def last_error(log: Path) -> str | None:
    """The last error message that ``alignpro`` has written to a log, which may have several lines; None if there is none."""
    text = log.read_text(errors="replace") if log.exists() else ""
    _, found, message = f"\n{text}".rpartition("\nerror: ")
    return message.strip() if found else None


def _wait(process: subprocess.Popen[bytes]) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_BETWEEN_LOOKS)


def signal_session(leader: int, signum: int) -> None:
    """Signal a command that leads a session of its own, and the processes that it has started."""
    with suppress(ProcessLookupError):  # it may have just ended
        os.killpg(leader, signum)


def end_with_parent() -> None:
    """Have the kernel send this process a SIGTERM when the one that started it ends, however that ends."""
    if _LIBC is not None:
        _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
