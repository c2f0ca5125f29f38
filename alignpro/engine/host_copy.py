"""Arrays of the host on a device: one copy for all of them, for which the host does not wait."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16  # bytes: kernels are recompiled for arrays of a different alignment

Array = NDArray[Any]


def to_device(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on a device; on a CPU they keep their memory.

    A copy from memory that is not pinned would wait until the device has done all that it was given before.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    # PyTorch's allocator of pinned memory does not reuse a block before the copies from it are done.
    memory = torch.empty(sum(_spaces(arrays)), dtype=torch.uint8, pin_memory=device.type == "cuda")
    pack(arrays, memory)
    return unpack(arrays, memory.to(device, non_blocking=True))


def pack(arrays: Sequence[Array], memory: Tensor) -> None:
    """Write arrays one behind the other into a buffer on the host, uint8."""
    into = memory.numpy()
    for array, begin in zip(arrays, _begins(arrays), strict=True):
        into[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def unpack(arrays: Sequence[Array], memory: Tensor) -> list[Tensor]:
    """The views of a packed buffer that have the dtypes and shapes of the arrays."""
    dtypes = [torch.from_numpy(array[:0]).dtype for array in arrays]
    return [
        memory[begin : begin + array.nbytes].view(dtype).view(array.shape)
        for array, dtype, begin in zip(arrays, dtypes, _begins(arrays), strict=True)
    ]


def _spaces(arrays: Sequence[Array]) -> list[int]:
    return [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]


def _begins(arrays: Sequence[Array]) -> list[int]:
    return [0, *accumulate(_spaces(arrays))][:-1]
