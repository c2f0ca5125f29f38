"""Whether Triton can run here, and on which devices."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch


def unavailable() -> str | None:
    """Return the reason why Triton cannot run here, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (it comes with PyTorch on Linux)"
    if torch.cuda.is_available():  # also true on ROCm
        if torch.version.hip is None and (capability := torch.cuda.get_device_capability()) < (8, 0):
            return f"the GPU has compute capability {capability[0]}.{capability[1]}: the kernels need 8.0 (Ampere)"
        return None
    if interpreting():
        return None
    return "there is no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on a CPU, for tests only)"


def interpreting() -> bool:
    """Whether Triton runs its kernels in its NumPy interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def supports(device: torch.device) -> bool:
    """Whether the kernels support tensors on a device."""
    return device.type == "cuda" or (device.type == "cpu" and interpreting())


def device_guard(device: torch.device) -> AbstractContextManager[object]:
    """Make the tensors' device the current one, on which Triton launches its kernels."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
