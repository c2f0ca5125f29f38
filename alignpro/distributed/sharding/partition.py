"""Frozen weights in one contiguous buffer, of which each rank holds an equal part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

_ALIGNMENT = 64
"""Weights and parts start at multiples of this number of bytes."""


class Partition:
    """Weights that are sharded over ranks: they hold data between `place` and `vacate`, and have no elements otherwise.

    They lie one after another in a buffer of bytes, so that one collective gathers them where they are used. Nothing is
    copied afterwards: the weights become views of the buffer.

    Args:
        weights: Whole weights of any dtype, each once; they have no elements from now on.
        device: The device where they are used.
        rank: Index of the part to keep.
        size: Number of parts, one for each rank of the default process group; 1 keeps the whole buffer here.
        home: The device where the part is kept; by default ``device``, which more than one part requires.
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        device: torch.device,
        rank: int,
        size: int,
        home: torch.device | None = None,
    ) -> None:
        self._size, self.device = size, device
        self._places: list[tuple[nn.Parameter, int, torch.Size]] = []
        end = 0
        for weight in weights:
            self._places.append((weight, end, weight.shape))
            end += -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT
        part = -(-end // (size * _ALIGNMENT)) * _ALIGNMENT
        self.nbytes = part * size
        """Bytes of the whole buffer."""
        home = home or device
        pinned = home.type == "cpu" and device.type == "cuda"
        self.part = torch.zeros(part, dtype=torch.uint8, device=home, pin_memory=pinned)
        """(bytes,) uint8: the part that is kept on this rank."""
        first = rank * part
        for weight, start, _ in self._places:
            data = weight.data.contiguous().view(-1).view(torch.uint8)
            begin, stop = max(start, first), min(start + len(data), first + part)
            if begin < stop:
                self.part[begin - first : stop - first].copy_(data[begin - start : stop - start])
            weight.data = torch.empty(0, dtype=weight.dtype, device=device)

    def gather(self, memory: Tensor) -> dist.Work | None:
        """Start to gather all parts; a collective.

        Args:
            memory: (bytes,) uint8 on the device, at least ``nbytes``.

        Returns:
            The operation to wait for before `place`; None if there is none.
        """
        whole = memory[: self.nbytes]
        if self._size == 1:
            whole.copy_(self.part, non_blocking=True)
            return None
        return dist.all_gather_into_tensor(whole, self.part, async_op=True)

    def materialize(self, memory: Tensor) -> None:
        """Make the weights views of the gathered memory; they are valid until it is overwritten."""
        for weight, start, shape in self._places:
            stop = start + prod(shape) * weight.element_size()
            weight.data = memory[start:stop].view(weight.dtype).view(shape)

    def release(self) -> None:
        """Make the weights empty again."""
        for weight, _, _ in self._places:
            weight.data = torch.empty(0, dtype=weight.dtype, device=self.device)


def buckets(units: Sequence[Sequence[nn.Parameter]], most: int) -> Iterator[list[Sequence[nn.Parameter]]]:
    """Group consecutive units into buckets of at most ``most`` bytes; a larger unit is a bucket of its own."""
    bucket: list[Sequence[nn.Parameter]] = []
    size = 0
    for unit in units:
        needed = sum(weight.nbytes for weight in unit)
        if bucket and size + needed > most:
            yield bucket
            bucket, size = [], 0
        bucket.append(unit)
        size += needed
    if bucket:
        yield bucket
