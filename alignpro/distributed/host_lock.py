"""Mutual exclusion of a host's processes, for work whose memory the host cannot provide several times at once."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def host_lock() -> Iterator[None]:
    """Wait until no other process of this job and host is inside; not a collective, so a failure blocks no other rank."""
    path = Path(tempfile.gettempdir(), f"alignpro-{os.getuid()}-{os.environ.get('MASTER_PORT', 0)}.lock")
    file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
