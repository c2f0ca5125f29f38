"""The processes of one host one after another, for what would not fit into its memory several times."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def host_turn() -> Iterator[None]:
    """Wait until no other process of this job and host is in here. No collective: one that fails keeps nobody waiting."""
    path = Path(tempfile.gettempdir(), f"alignpro-{os.getuid()}-{os.environ.get('MASTER_PORT', 0)}.lock")
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
