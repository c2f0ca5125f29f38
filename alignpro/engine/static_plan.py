"""Plans of decode batches in buffers that stay: the next step of the same sequences only writes new values into them.

Sequences that compute one token each differ from step to step in their last tokens and lengths alone. So their inputs are
arrays of a `Shape`, filled from the `SequenceTable` without a loop over sequences. Where passes are captured as CUDA graphs,
shapes are padded, so that there are few of them; elsewhere they have exactly the batch's rows.

| owns | does not own |
|---|---|
| shapes, their buffers, what is written to them | graphs (`graphs`), attention (`paged_attention.PagedAttention`) |

A padding row attends to no key (its position is −1), and its own key is not written (slot −1).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from alignpro.engine.sequence_table import DecodeRows, Ints, SequenceTable
from alignpro.models.language_model import LanguageModel
from alignpro.models.paged_attention import PagedAttention
from alignpro_kernels import PagedKeys

ALL_ROWS = -1
"""Value of `Shape.active` if a token LoRA acts on all tokens."""
_NO_ROWS = np.zeros(0, np.int64)


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
        """Buffer sizes in int32 elements: ids, positions, slots, active rows (all int64), then five per level."""
        first = [2 * self.rows] * 3 + [2 * max(0, self.active)]
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
    return next(size for size in (1, rows // 8, rows) if segments <= size)


class _Buffers(NamedTuple):
    ids: Tensor
    """(T,) int64; 0 for padding."""
    positions: Tensor
    """(T,) int64; 0 for padding."""
    slots: Tensor
    """(T,) int64."""
    active: Tensor
    """(A,) int64: rows that a token LoRA acts on; padded with the last row, which is itself padding."""
    levels: list[PagedKeys]

    @classmethod
    def within(cls, memory: Tensor, shape: Shape) -> _Buffers:
        """Views of a single int32 buffer, so that one copy fills them all."""
        spaces = memory.split(shape.spaces)
        ids, positions, slots, active, *rest = (x[:size] for x, size in zip(spaces, shape.sizes, strict=True))
        levels = []
        for i, (s, pages) in enumerate(shape.levels):
            seen_from, bounds, table, lengths, starts = rest[5 * i : 5 * i + 5]
            levels.append(PagedKeys(bounds, table.view(s, pages), lengths, seen_from, starts))
        ids, positions, slots, active = (x.view(torch.int64) for x in (ids, positions, slots, active))
        return cls(ids, positions, slots, active, levels)


class _HostLevel(NamedTuple):
    """A level of the host's buffer; see `PagedKeys`."""

    cu_queries: Any
    page_table: Any
    key_lengths: Any
    query_positions: Any
    key_starts: Any


class StaticPlan(PagedAttention):
    """The attention metadata of a batch in static buffers, and the graph that reads them."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        self.memory = torch.zeros(sum(shape.spaces), dtype=torch.int32, device=device)
        self.ids, self.positions, slots, active, levels = _Buffers.within(self.memory, shape)
        self.active = active if shape.active > 0 else shape.active == ALL_ROWS
        super().__init__((), slots, levels, in_order=False)  # padding rows come after a segment's queries
        self.runs = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.states: Tensor | None = None
        """(T, D): the buffer into which the graph writes the last hidden states."""
        self._host_memory = torch.zeros(len(self.memory), dtype=torch.int32, pin_memory=self.memory.is_cuda)
        self._copied = torch.cuda.Event() if self.memory.is_cuda else None
        host = _Buffers.within(self._host_memory, shape)
        self._host = [x.numpy() for x in (host.ids, host.positions, host.slots, host.active)]
        self._host_levels = [
            _HostLevel(*(getattr(level, name).numpy() for name in _HostLevel._fields)) for level in host.levels
        ]

    def fill(self, table: SequenceTable, batch: DecodeRows, active: Ints) -> None:
        """Copy a batch that fits into the buffers.

        Args:
            table: The running sequences.
            batch: Those of the batch.
            active: The rows that a token LoRA acts on; empty if it acts on all or on none.
        """
        if self._copied is not None:
            self._copied.synchronize()  # the host's buffer may be written again
        ids, positions, slots, active_rows = self._host
        count, rows = len(batch.rows), self.shape.rows
        counts = table.columns["count"][batch.rows]
        last = counts - 1
        at = table.starts[batch.outputs] + last
        table.lengths[batch.outputs] = counts
        ids[:count], ids[count:] = table.columns["last_token"][batch.rows], 0
        positions[:count], positions[count:] = at, 0
        slots[:count], slots[count:] = table.columns["slots_from"][batch.rows] + last, -1
        active_rows[: len(active)], active_rows[len(active) :] = active, rows - 1
        for level, own in zip(self._host_levels, batch.levels, strict=True):
            segments = len(own.begins)
            level.query_positions[:count], level.query_positions[count:] = np.where(own.reached, at, -1), -1
            # A row without a segment at this level is counted with the preceding segment: at query position −1 it attends
            # to none of that segment's keys.
            level.cu_queries[:segments], level.cu_queries[segments:] = own.begins, rows
            level.key_lengths[:segments] = table.lengths[own.segments]
            level.key_starts[:segments] = table.starts[own.segments]
            width = min(level.page_table.shape[1], table.pages.shape[1])
            level.page_table[:segments, :width] = table.pages.take(own.segments, axis=0)[:, :width]
        self.memory.copy_(self._host_memory, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def forward(self, model: LanguageModel, layers: Sequence[Tensor]) -> Tensor:
        """The last hidden states of the tokens, (T, D), including padding; ``layers`` are the pages of each layer."""
        self.layers = layers
        try:
            return model.token_states(self.ids, self.positions, self, self.active, soft_prompt=False)
        finally:
            self.layers = ()  # these views would keep a released arena alive


class StaticPlans:
    """The static plans of the decode batches on one device, by model and shape; the least recently used is dropped.

    Args:
        device: Where the buffers are.
        limit: Maximum number of plans.
        rows_for: The number of rows for a number of tokens: `padded` or `exact`.
    """

    def __init__(self, device: torch.device, limit: int, rows_for: Callable[[int], int]) -> None:
        self._device, self._limit, self._rows_for = device, limit, rows_for
        self.by_shape: OrderedDict[tuple[str, Shape], StaticPlan] = OrderedDict()  # least recently used first
        self._widths: dict[tuple[str, int], int] = {}  # model, depth → the largest number of pages per segment so far

    def __len__(self) -> int:
        return len(self.by_shape)

    def plan(self, name: str, table: SequenceTable, batch: DecodeRows, *, with_adapter: bool) -> StaticPlan:
        """The plan of a batch of a model, valid until the next one; ``with_adapter``: it may act on some rows only."""
        active = table.rows_of_model(batch.rows, name) if with_adapter else _NO_ROWS
        whole = not with_adapter or len(active) == len(batch.rows)
        levels = [
            (len(level.begins), self._width(name, depth, int(table.max_pages[level.segments].max())))
            for depth, level in enumerate(batch.levels)
        ]
        shape = Shape.for_batch(len(batch.rows), levels, ALL_ROWS if whole else len(active), self._rows_for)
        plan = self.by_shape.pop((name, shape), None) or StaticPlan(shape, self._device)
        self.by_shape[name, shape] = plan
        if len(self.by_shape) > self._limit:
            self.by_shape.popitem(last=False)
        plan.fill(table, batch, _NO_ROWS if whole else active)
        return plan

    def drop(self, name: str) -> None:
        """Drop the plans of a model."""
        for key in [key for key in self.by_shape if key[0] == name]:
            del self.by_shape[key]

    def clear(self) -> None:
        """Drop all plans."""
        self.by_shape.clear()

    def _width(self, name: str, depth: int, pages: int) -> int:
        """The number of pages per segment: it never becomes smaller, so that shapes recur."""
        self._widths[name, depth] = width = max(self._widths.get((name, depth), 1), power_of_two(pages))
        return width
