"""One process at a time writes a ledger; the operating system takes the lock away from a process that is killed."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from alignpro.errors import LedgerError


def lock_ledger(path: Path) -> IO[str]:
    """Take the lock of a ledger, which is held until the returned file is closed.

    It is a file beside the ledger: closing a descriptor of the database itself would drop SQLite's own locks.

    Raises:
        LedgerError: Another process holds it; the message names it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(  # noqa: SIM115 - it stays open, and is created with its mode
            path.with_name(f"{path.name}.lock"),
            "a+",
            opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600),
        )
    except OSError as error:
        raise LedgerError(f"ledger {path}: cannot be locked: {error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise LedgerError(f"ledger {path}: is in use by {holder}; wait until it ends, or name another ledger") from None
    except OSError as error:
        file.close()
        raise LedgerError(f"ledger {path}: cannot be locked: {error}") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
