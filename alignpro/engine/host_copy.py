"""Copies between host and device, each for all that goes there at once, for which the host does not wait."""

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


class HostTokens:
    """Drawn tokens on their way to the host, in one copy.

    Args:
        tokens: (B,) int64.
        logprobs: (B,) their log-probabilities, float32 or float64.
        total: (), a sum that the host wants to know as well.
    """

    def __init__(self, tokens: Tensor, logprobs: Tensor, total: Tensor) -> None:
        self._here: tuple[Tensor, Tensor, float] | None = None
        self._arrived: torch.cuda.Event | None = None
        if (device := tokens.device).type == "cpu":
            self._here = tokens, logprobs, total.item()
            return
        # A float64 holds every token id exactly.
        self._sent = torch.cat([tokens.double(), logprobs, total.reshape(1)])  # (2 B + 1,)
        if device.type == "cuda":
            # PyTorch's allocator of pinned memory does not reuse the block before this copy is done.
            pinned = torch.empty(len(self._sent), dtype=torch.float64, pin_memory=True)
            self._sent = pinned.copy_(self._sent, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(device))

    def wait(self) -> tuple[Tensor, Tensor, float]:
        """Tokens, log-probabilities and the sum, on the host."""
        if self._here is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            drawn = self._sent.cpu()  # elsewhere than on CUDA devices this is the copy
            count = len(drawn) // 2
            self._here = drawn[:count].long(), drawn[count:-1], float(drawn[-1])
        return self._here

    def at(self, places: Array) -> HostTokens:
        """Some of the tokens, for which it waits."""
        tokens, logprobs, total = self.wait()
        index = torch.from_numpy(places)
        return HostTokens(tokens[index], logprobs[index], torch.tensor(total, dtype=torch.float64))


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
