"""What a result says of the machine that only its tools know, without importing torch: the card, its driver, the commit."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


@cache
def gpu() -> dict[str, str | int] | None:
    """Return name, driver and memory (bytes) of the first NVIDIA GPU, as nvidia-smi gives them; None without one."""
    line = _output(
        "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits", "-i=0"
    )
    if line is None:
        return None
    name, driver, mebibytes = (field.strip() for field in line.splitlines()[0].split(","))
    return {"name": name, "driver": driver, "memory_bytes": int(mebibytes) << 20}


@cache
def commit() -> str | None:
    """Return the commit of this tree, with ``+`` if files differ from it.

    Where the sources travel without their history, the variable COMMIT says it; None if nothing does.
    """
    if given := os.environ.get("COMMIT"):
        return given
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("+" if _output("git", "-C", str(ROOT), "status", "--porcelain") else "")


def slug(name: str) -> str:
    """Return a device's name as that of a folder, such as ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _output(*command: str) -> str | None:
    """Return what a tool prints, or None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
