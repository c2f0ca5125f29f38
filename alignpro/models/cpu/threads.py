"""How many threads compute, and how they wait for each other; decided before torch is loaded, which reads it once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "600"}
"""How threads wait for each other. 600 turns are some 20 to 40 µs, in which most waits end; to wake a thread takes longer on a
virtual machine."""


def set_environment() -> None:
    """Set what OpenMP reads when torch is loaded, where the user has not set it: it must not be loaded yet.

    Threads sleep after a short wait. By default they spin, and if another process holds the core of one of them, all others
    spin until its turn is over, which makes generation many times slower. A container or service with a quota gets as many
    threads as whole cores.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ.update(WAITING)
    if (quota := cpu_quota()) is not None and quota < num_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(quota))))


@contextmanager
def own_waiting() -> Iterator[None]:
    """Let processes that are started within wait as they would without `set_environment`: other programs, which are compared."""
    ours = {name: value for name, value in WAITING.items() if os.environ.get(name) == value}
    for name in ours:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(ours)


def num_cores() -> int:
    """Number of cores that the process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that the process may use, which may be below 1; None without a limit.

    It is the least that a control group (version 1 or 2) above the process has, such as a container or a service.

    Args:
        root: Where ``proc`` and ``sys`` are mounted.
    """
    quotas = (_quota_of(group) for group in dict.fromkeys(control_groups("cpu", root)))
    return min((quota for quota in quotas if quota is not None), default=None)


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Directories of the groups above the process that limit it by a controller (version 1 or 2); some may not exist.

    Within a container, the path in /proc/self/cgroup may be that on the host; then the mount's root is the container's group.
    """
    mounts = root / "sys/fs/cgroup", root / "sys/fs/cgroup" / controller  # versions 2 and 1
    yield from mounts
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            group = mounts[controllers != ""] / path.lstrip("/")
            yield from (each for each in (group, *group.parents) if mounts[0] in each.parents)


def _quota_of(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    if quota == "max" or float(quota) <= 0:
        return None
    return float(quota) / float(period)
