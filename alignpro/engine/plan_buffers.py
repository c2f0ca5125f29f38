"""The inputs of a decode step in one buffer, so that a single copy brings all of them to the device.

| owns | does not own |
|---|---|
| shapes, the layout of a buffer | what is written to it (`sequence_arrays`), when (`static_plan`) |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignpro_kernels import PagedKeys

ALL_ROWS = -1
"""Value of `Shape.active` if a token LoRA acts on all tokens."""


class Shape(NamedTuple):
    """The sizes of a batch that its buffers fix. They are coarse, so that a run needs few of them."""

    rows: int
    """T: the number of tokens, including padding."""
    levels: tuple[tuple[int, int], ...]
    """For each depth, the number of segments S and the maximum number of pages per segment, including padding."""
    active: int
    """Number of tokens that a token LoRA acts on, including padding; `ALL_ROWS` for all of them."""

    @classmethod
    def for_batch(
        cls, tokens: int, levels: Sequence[tuple[int, int]], active: int, rows_for: Callable[[int], int]
    ) -> Shape:
        """The shape for ``tokens`` tokens, where the adapter acts on ``active`` of them or on `ALL_ROWS`.

        ``rows_for`` gives the number of rows for that of tokens: `padded` or `exact`.
        """
        some = active > 0
        rows = rows_for(tokens + some)  # an adapter that acts on some tokens needs a padding row to act on as well
        sizes = tuple((_padded_segments(rows, s), power_of_two(pages)) for s, pages in levels)
        return cls(rows, sizes, rows if some else active)

    @property
    def sizes(self) -> list[int]:
        """Buffer sizes in int32 elements: ids, positions, slots, seeds, active rows (all int64), then five per level."""
        first = [2 * self.rows] * 4 + [2 * max(0, self.active)]
        return first + [n for s, pages in self.levels for n in (self.rows, s + 1, s * pages, s, s)]

    @property
    def spaces(self) -> list[int]:
        """`sizes` rounded up to 16 bytes each: kernels are recompiled for buffers of a different alignment."""
        return [-(-size // 4) * 4 for size in self.sizes]


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()


def padded(count: int) -> int:
    """Round up to 8, 16, 32, …, 256, then to multiples of 64 up to 512, of 128 up to 1024, and so on.

    Up to some 256 rows a decode step takes as long as reading the weights, and more rows cost little. Beyond that its
    products count, and at most a quarter is added.
    """
    return max(8, power_of_two(count)) if count <= 256 else -(-count // (step := power_of_two(count) // 8)) * step


def exact(count: int) -> int:
    """The number itself: where no graphs are captured, padding would only cost time."""
    return count


def _padded_segments(rows: int, segments: int) -> int:
    """Round up to 1 (what all sequences share), an eighth of the rows (what many share), or all rows."""
    return 1 if segments <= 1 else rows // 8 if segments <= rows // 8 else rows


class HostLevel(NamedTuple):
    """A level's arrays on the host, int32; see `PagedKeys`."""

    cu_queries: Any
    page_table: Any
    key_lengths: Any
    query_positions: Any
    key_starts: Any


class HostArrays(NamedTuple):
    """The parts of a host's buffer as arrays; see `PlanBuffers`."""

    ids: Any
    positions: Any
    slots: Any
    seeds: Any
    active: Any
    levels: list[HostLevel]


class PlanBuffers:
    """Views of one int32 buffer for a batch of a shape.

    Args:
        shape: The sizes of the parts, which lie one behind the other in the order of `Shape.sizes`.
        memory: (sum of ``shape.spaces``,) int32.
    """

    def __init__(self, shape: Shape, memory: Tensor) -> None:
        self.shape, self.memory = shape, memory
        parts = [x[:size] for x, size in zip(memory.split(shape.spaces), shape.sizes, strict=True)]
        self.ids, self.positions, self.slots, self.seeds, self.active = (x.view(torch.int64) for x in parts[:5])
        """(T,) int64 each, and (A,): token ids, positions, slots, seeds of the next tokens, rows that a token LoRA acts on.

        A padding row has id, position and seed 0 and slot −1. Active rows are padded with the last row, which is padding.
        """
        self.levels: list[PagedKeys] = []
        for i, (segments, pages) in enumerate(shape.levels):
            seen_from, bounds, table, lengths, starts = parts[5 + 5 * i : 10 + 5 * i]
            self.levels.append(PagedKeys(bounds, table.view(segments, pages), lengths, seen_from, starts))
        self.layout = (shape.rows, max(0, shape.active), [size for level in shape.levels for size in level])
        """What the operator that fills a buffer must know of it: rows, active rows, segments and pages of each level."""

    @cached_property
    def arrays(self) -> HostArrays:
        """The parts of a buffer on the host."""
        levels = [HostLevel(*(getattr(each, name).numpy() for name in HostLevel._fields)) for each in self.levels]
        return HostArrays(
            self.ids.numpy(),
            self.positions.numpy(),
            self.slots.numpy(),
            self.seeds.numpy(),
            self.active.numpy(),
            levels,
        )
