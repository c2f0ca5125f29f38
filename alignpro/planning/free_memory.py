"""How much memory a process can still take: of a GPU, or of the host within the limits of its control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from alignpro.distributed.launcher import launched_here
from alignpro.models.cpu.threads import control_groups

_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""The limit, the usage, and the entry of memory.stat that counts cached files; of versions 2 and 1."""


def free_memory(device: torch.device, root: Path = Path("/")) -> float:
    """Return the bytes that this process can take on a device.

    Of a GPU, what its driver reports as free, and what PyTorch's allocator holds without using it. Of the host, what the
    kernel and every control group leave, in equal shares for the ranks that a launcher has started on this machine.

    Args:
        device: The device.
        root: Where ``proc`` and ``sys`` are mounted.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return min((_available(root), *_cgroup_room(root))) / (launched_here() or 1)


def _available(root: Path) -> float:
    """Bytes that the kernel can hand out without swapping; where it does not say, half of all memory."""
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except FileNotFoundError:
        pass
    return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_room(root: Path) -> Iterator[float]:
    """Yield what each control group above this process leaves of its limit; cached files count as free."""
    for group in dict.fromkeys(control_groups("memory", root)):
        for names in _FILES:
            if (room := _room(group, *names)) is not None:
                yield room


def _room(group: Path, limit_file: str, usage_file: str, cached: str) -> float | None:
    """Bytes that a control group leaves; None without a limit, or where there is no such group."""
    try:
        limit = (group / limit_file).read_text().strip()
        if limit == "max":
            return None
        usage = int((group / usage_file).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return max(0.0, int(limit) - usage + int(stat.get(cached, 0)))
