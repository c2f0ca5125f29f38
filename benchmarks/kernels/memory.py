"""Peak memory of one call, beyond what was there before it."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from alignpro_kernels import cpp_head

MIB = 2**20

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that ``call`` held at once beyond what was held before; None where it cannot be told.

    What it returns counts, gradients too. On a GPU this is the allocator's own maximum.

    On a CPU it is the process's resident memory: the kernel keeps its high-water mark and resets it on request
    (Linux). Memory freed earlier, and what our CPU backend keeps for its next call, is handed back first, or it would be
    used again unseen; allocations of 1 MiB and more
    are then found to within 1 %, a few MiB at most. A fresh process a call would tell no more: its first call would
    also count libraries, compilers and the threads' own buffers, and a maximum taken over the process's life cannot
    be told from the peak of making the inputs.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not (sys.platform == "linux" and _reset()):
        call()
        return None
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _reset() -> bool:
    """Hand freed memory back and set the high-water mark to what is resident now; False where one cannot."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is None:
        return False
    cpp_head.release_workspace()
    trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")
