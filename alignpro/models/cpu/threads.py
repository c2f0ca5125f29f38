"""How many threads compute, and how they wait for each other; decided before torch is loaded, which reads it once."""

from __future__ import annotations

import os
from pathlib import Path


def set_environment() -> None:
    """Set what OpenMP reads when torch is loaded, where the user has not set it: it must not be loaded yet.

    Threads sleep while they wait. By default they spin, and if another process holds the core of one of them, all others
    spin until its turn is over, which makes generation many times slower. A container with a quota gets as many threads
    as whole cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if (quota := cpu_quota()) is not None and quota < num_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(quota))))


def num_cores() -> int:
    """Number of cores that the process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that the container may use (cgroup v2 or v1), which may be below 1; None without a limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    if quota == "max" or float(quota) <= 0:
        return None
    return float(quota) / float(period)
