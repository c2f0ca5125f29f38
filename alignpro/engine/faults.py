"""What an exception in the middle of a run says about who has failed: one sequence, the device, or nobody."""

from __future__ import annotations

import torch

from alignpro.distributed.ranks import lost_ranks
from alignpro.errors import AlignProError

_DEVICE_LOST = ("CUDA error", "HIP error", "Triton Error")
_NO_HOST_MEMORY = "DefaultCPUAllocator"


def ends_run(error: Exception) -> bool:
    """Whether nothing can be computed after an error.

    A device that has raised an asynchronous error refuses all work from then on, and nobody can tell whose fault it was.
    An error of Align-Pro's own says that the engine has been set up wrongly, for all sequences alike. A model whose layers
    are gathered from other ranks cannot run without them.
    """
    if isinstance(error, torch.AcceleratorError | AlignProError) or lost_ranks(error):
        return True
    # Libraries beside PyTorch raise a plain RuntimeError.
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _DEVICE_LOST)


def out_of_memory(error: Exception) -> bool:
    """Whether less work at once might succeed. On the CPU PyTorch has no class for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _NO_HOST_MEMORY in str(error)


def described(what: str, error: Exception) -> str:
    """An exception as the reason why a sequence has failed."""
    return f"{what} raised {type(error).__name__}: {error}"
