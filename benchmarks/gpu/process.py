"""A process with a time limit, whose output is shown and kept as it comes."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE = 5.0
"""Seconds between the request to end and the end by force."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: str
    """``ok``, ``failed`` or ``timeout``."""
    code: int
    seconds: float


def run(
    command: Sequence[str],
    log: Path,
    *,
    seconds: float,
    environment: Mapping[str, str],
    directory: Path,
    idle: Callable[[], None] = lambda: None,
) -> Ended:
    """Run a command in a process group of its own, which ends with it or at the time limit.

    Args:
        command: The program and its arguments.
        log: Where its output goes, besides this process's own.
        seconds: The time limit.
        environment: Its variables.
        directory: Its working directory.
        idle: Called about once a second.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        with log.open("wb") as file, selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            open_ = True
            while open_ and time.monotonic() - started < seconds:
                if selector.select(timeout=1.0):
                    read = os.read(process.stdout.fileno(), 1 << 16)
                    open_ = bool(read)
                    for stream in (file, sys.stdout.buffer):
                        stream.write(read)
                        stream.flush()
                elif process.poll() is not None:  # what it has left behind holds its output open
                    break
                idle()
        remaining = max(0.0, seconds - (time.monotonic() - started))
        code = process.wait(timeout=remaining)
        status = "failed" if code else "ok"
    except subprocess.TimeoutExpired:
        status, code = "timeout", 124
    finally:
        _end(process)
    return Ended(status, code, time.monotonic() - started)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the process group: first by request, then by force."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            process.poll()  # a process that has ended is in its group until it has been waited for
            os.killpg(process.pid, 0)
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # none is left
    process.wait()
