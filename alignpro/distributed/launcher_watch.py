"""A rank that outlives its launcher stops as if it had been told to, with its state saved.

The ``deepspeed`` command starts another process on each node, and that one the ranks. A SIGTERM that a scheduler sends to
the command ends it and nothing else: neither the ranks nor what started them learn of it.
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
"""What DeepSpeed's launcher is installed as."""


def stop_with_launcher() -> None:
    """Send this process a SIGTERM as soon as one of the processes of the launcher that it comes from has ended.

    On Linux; elsewhere, and under another launcher than DeepSpeed's, nothing is watched.
    """
    if sys.platform != "linux":
        return
    try:
        watched = [os.pidfd_open(process) for process in _launchers()]
    except ProcessLookupError:  # gone already
        os.kill(os.getpid(), signal.SIGTERM)
        return
    except OSError as error:  # a kernel before 5.3
        logger.warning("the launcher is not watched (%s): send a SIGTERM to the ranks, not to it", error)
        return
    if watched:
        threading.Thread(target=_stop_after, args=(watched,), name="launcher watch", daemon=True).start()


def _launchers() -> list[int]:
    """The ancestors of this process that are parts of DeepSpeed's launcher, the nearest first."""
    found = []
    process = os.getppid()
    while process > 1 and _is_launcher(process):
        found.append(process)
        # "pid (name) state parent …", and the name may hold anything.
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def _is_launcher(process: int) -> bool:
    try:
        arguments = Path(f"/proc/{process}/cmdline").read_text().split("\0")
    except OSError:  # another user's, or ended
        return False
    return any("deepspeed.launcher." in each or Path(each).name in _COMMANDS for each in arguments)


def _stop_after(watched: Sequence[int]) -> None:
    """Wait until one of some processes, given by descriptors, has ended."""
    select.select(watched, [], [])
    os.kill(os.getpid(), signal.SIGTERM)
