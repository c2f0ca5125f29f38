"""Frozen weights in one piece of memory, of which each rank holds an equal part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

_ALIGNMENT = 64
"""Bytes at whose multiples weights and parts begin."""


class Partition:
    """Some weights, which are there between `gather` and `vacate` and have no elements otherwise.

    They lie one after another, so that one collective brings them together where they are used, and nothing is copied:
    the weights are views.

    Args:
        weights: Whole, each once; they are empty from now on. All that they hold is taken as bytes, of any dtype.
        device: Where they are to be used.
        rank: Which part is kept.
        size: How many parts there are: the ranks of the default process group; 1 keeps all of them here.
        home: Where the part is kept; ``device`` when absent, and the only choice for more than one part.
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
        """Of the whole."""
        home = home or device
        pinned = home.type == "cpu" and device.type == "cuda"
        self.part = torch.zeros(part, dtype=torch.uint8, device=home, pin_memory=pinned)
        """(bytes,) uint8: what is kept here."""
        first = rank * part
        for weight, start, _ in self._places:
            data = weight.data.contiguous().view(-1).view(torch.uint8)
            begin, stop = max(start, first), min(start + len(data), first + part)
            if begin < stop:
                self.part[begin - first : stop - first].copy_(data[begin - start : stop - start])
            weight.data = torch.empty(0, dtype=weight.dtype, device=device)

    def gather(self, memory: Tensor) -> dist.Work | None:
        """Begin to bring all parts together: a collective.

        Args:
            memory: (bytes,) uint8 on the device, at least ``nbytes``.

        Returns:
            What to wait for before `place`; None for nothing.
        """
        whole = memory[: self.nbytes]
        if self._size == 1:
            whole.copy_(self.part, non_blocking=True)
            return None
        return dist.all_gather_into_tensor(whole, self.part, async_op=True)

    def place(self, memory: Tensor) -> None:
        """Let the weights be what has been gathered, for as long as nothing else is written there."""
        for weight, start, shape in self._places:
            stop = start + prod(shape) * weight.element_size()
            weight.data = memory[start:stop].view(weight.dtype).view(shape)

    def vacate(self) -> None:
        """Let the weights have no elements again."""
        for weight, _, _ in self._places:
            weight.data = torch.empty(0, dtype=weight.dtype, device=self.device)


def lots(units: Sequence[Sequence[nn.Parameter]], most: int) -> Iterator[list[Sequence[nn.Parameter]]]:
    """Neighbours together, as many as have ``most`` bytes at most; a unit that is larger is alone."""
    lot: list[Sequence[nn.Parameter]] = []
    size = 0
    for unit in units:
        needed = sum(weight.nbytes for weight in unit)
        if lot and size + needed > most:
            yield lot
            lot, size = [], 0
        lot.append(unit)
        size += needed
    if lot:
        yield lot
