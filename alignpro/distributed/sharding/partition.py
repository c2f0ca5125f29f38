"""Frozen weights in one contiguous buffer, of which each rank holds an equal part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

_ALIGNMENT = 64
"""Weights and shards start at multiples of this number of bytes."""

T = TypeVar("T")


class Partition:
    """Weights that are sharded over ranks: they hold data between `gather` and `release`, and have no elements otherwise.

    They lie one after another in a buffer of bytes, so that one collective gathers them where they are used. Nothing is
    copied afterwards: the weights become views of the buffer.

    Args:
        weights: Whole weights of any dtype, each once; they have no elements from now on.
        device: The device where they are used.
        rank: Index of the shard to keep.
        size: Number of shards, one for each rank of the default process group; 1 keeps the whole buffer here.
        shard_device: The device where the shard is kept; by default ``device``, which more than one shard requires.
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        device: torch.device,
        rank: int,
        size: int,
        shard_device: torch.device | None = None,
    ) -> None:
        self._size, self._device = size, device
        self._layout: list[tuple[nn.Parameter, int, torch.Size]] = []
        end = 0
        for weight in weights:
            self._layout.append((weight, end, weight.shape))
            end += -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT
        shard_bytes = -(-end // (size * _ALIGNMENT)) * _ALIGNMENT
        shard_device = shard_device or device
        pinned = shard_device.type == "cpu" and device.type == "cuda"
        self.shard = torch.zeros(shard_bytes, dtype=torch.uint8, device=shard_device, pin_memory=pinned)
        """(bytes,) uint8: the part of the buffer that is kept on this rank."""
        first = rank * shard_bytes
        for weight, start, _ in self._layout:
            data = weight.data.contiguous().view(-1).view(torch.uint8)
            begin, stop = max(start, first), min(start + len(data), first + shard_bytes)
            if begin < stop:
                self.shard[begin - first : stop - first].copy_(data[begin - start : stop - start])
            weight.data = torch.empty(0, dtype=weight.dtype, device=device)

    def allocate(self) -> Tensor:
        """Allocate the whole buffer where the weights are used: (bytes,) uint8."""
        return torch.empty(self._size * len(self.shard), dtype=torch.uint8, device=self._device)

    def gather(self, buffer: Tensor) -> None:
        """Gather all shards into a buffer and make the weights views of it; a collective of all shards' ranks."""
        if self._size == 1:
            buffer.copy_(self.shard, non_blocking=True)
        else:
            dist.all_gather_into_tensor(buffer, self.shard)
        for weight, start, shape in self._layout:
            stop = start + prod(shape) * weight.element_size()
            weight.data = buffer[start:stop].view(weight.dtype).view(shape)

    def release(self) -> None:
        """Make the weights empty again."""
        for weight, _, _ in self._layout:
            weight.data = torch.empty(0, dtype=weight.dtype, device=self._device)


def buckets(items: Iterable[T], nbytes: Callable[[T], int], max_bytes: int) -> Iterator[list[T]]:
    """Group consecutive items into buckets of at most ``max_bytes``; a larger item is a bucket of its own."""
    bucket: list[T] = []
    size = 0
    for item in items:
        needed = nbytes(item)
        if bucket and size + needed > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(item)
        size += needed
    if bucket:
        yield bucket
