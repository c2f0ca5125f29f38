"""Stops a rank that outlives its launcher as a SIGTERM would, with its state saved.

The ``deepspeed`` command starts a process on each node, which starts the ranks. A SIGTERM that a scheduler sends to the
command ends only the command: neither the ranks nor the processes that started them are notified.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

_COMMANDS = ("deepspeed", "deepspeed.pt", "ds")
"""Names under which DeepSpeed's launcher is installed."""


def stop_with_launcher() -> None:
    """Send this process a SIGTERM as soon as one of the launcher processes that started it has ended.

    Only on Linux and under DeepSpeed's launcher; elsewhere nothing is watched.
    """
    if sys.platform != "linux":
        return
    try:
        watched = [os.pidfd_open(process) for process in _launchers()]
    except ProcessLookupError:  # it has ended already
        os.kill(os.getpid(), signal.SIGTERM)
        return
    except OSError as error:  # Linux before 5.3
        logger.warning("cannot watch the launcher (%s): send SIGTERM to the ranks, not to the launcher", error)
        return
    if watched:
        threading.Thread(target=_stop_after, args=(watched,), name="launcher watch", daemon=True).start()


def _launchers() -> list[int]:
    """Process ids of the ancestors of this process that belong to DeepSpeed's launcher, nearest first."""
    found = []
    process = os.getppid()
    while process > 1 and _is_launcher(process):
        found.append(process)
        # "pid (name) state parent …", where the name may contain anything.
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def _is_launcher(process: int) -> bool:
    try:
        arguments = Path(f"/proc/{process}/cmdline").read_text().split("\0")
    except OSError:  # it belongs to another user, or has ended
        return False
    return any("deepspeed.launcher." in each or Path(each).name in _COMMANDS for each in arguments)


def _stop_after(watched: Sequence[int]) -> None:
    """Send this process a SIGTERM when one of the processes, given by file descriptors, has ended."""
    select.select(watched, [], [])
    os.kill(os.getpid(), signal.SIGTERM)
