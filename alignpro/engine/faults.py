"""Classify an exception raised during a run: it fails one sequence, ends the run, or calls for a smaller batch."""

from __future__ import annotations

import torch

from alignpro.errors import AlignProError

_DEVICE_LOST = ("CUDA error", "HIP error", "Triton Error")
_NO_HOST_MEMORY = "DefaultCPUAllocator"


def is_fatal(error: Exception) -> bool:
    """Whether nothing more can be computed after an error.

    A device that has raised an asynchronous error rejects all further work, and the error cannot be traced to a sequence.
    An `AlignProError` means that the engine is misconfigured, which affects all sequences.
    """
    if isinstance(error, torch.AcceleratorError | AlignProError):
        return True
    # Libraries other than PyTorch raise a plain RuntimeError.
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _DEVICE_LOST)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch might succeed. PyTorch has no exception class for running out of memory on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _NO_HOST_MEMORY in str(error)


def describe(what: str, error: BaseException) -> str:
    """Describe an exception as the reason for a sequence's failure."""
    return f"{what} raised {type(error).__name__}: {error}"
