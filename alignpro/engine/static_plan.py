"""Plans of decode batches in buffers that stay: the next step of the same sequences only writes new values into them.

Sequences that compute one token each differ from step to step in their last tokens and lengths alone. So their inputs are
arrays of a `Shape`, filled from the `SequenceTable` by one call. Where passes are captured as CUDA graphs,
shapes are padded, so that there are few of them; elsewhere they have exactly the batch's rows.

| owns | does not own |
|---|---|
| plans, when their buffers may be written, the widths of page tables | layout (`plan_buffers`), graphs (`graphs`) |

A padding row attends to no key (its position is −1), and its own key is not written (slot −1).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import zip_longest
from operator import gt

import numpy as np
import torch
from torch import Tensor

from alignpro.engine.plan_buffers import ALL_ROWS, PlanBuffers, Shape, power_of_two
from alignpro.engine.sequence_arrays import DecodeRows, Ints
from alignpro.engine.sequence_table import SequenceTable
from alignpro.models.language_model import LanguageModel
from alignpro.models.paged_attention import PagedAttention

WIDTHS_KEPT = 4096
"""Number of plans of a model after which a width of its page tables that none of them needed is given up."""
_NO_ROWS = np.zeros(0, np.int64)


class StaticPlan(PagedAttention):
    """The attention metadata of a batch in static buffers, and the graph that reads them."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        buffers = PlanBuffers(shape, torch.zeros(sum(shape.spaces), dtype=torch.int32, device=device))
        self.ids, self.positions, self.seeds = buffers.ids, buffers.positions, buffers.seeds
        self.active = buffers.active if shape.active > 0 else shape.active == ALL_ROWS
        # Padding rows come after a segment's queries.
        super().__init__((), buffers.slots, buffers.levels, in_order=False)
        self.runs = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.states: Tensor | None = None
        """(T, D): the buffer into which the graph writes the last hidden states."""
        self._memory = self._host = buffers
        self._copied: torch.cuda.Event | None = None
        if device.type != "cpu":  # there the buffer is written in place
            memory = torch.zeros(sum(shape.spaces), dtype=torch.int32, pin_memory=device.type == "cuda")
            self._host = PlanBuffers(shape, memory)
        if device.type == "cuda":
            self._copied = torch.cuda.Event()

    def fill(self, table: SequenceTable, batch: DecodeRows, active: Ints) -> None:
        """Copy a batch that fits into the buffers.

        Args:
            table: The running sequences.
            batch: Those of the batch.
            active: The rows that a token LoRA acts on; empty if it acts on all or on none.
        """
        if self._copied is not None:
            self._copied.synchronize()  # the host's buffer may be written again
        table.arrays.fill(batch, active, self._host)
        if self._host is not self._memory:
            self._memory.memory.copy_(self._host.memory, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._memory.memory.device))

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
        self._widths: dict[str, _Widths] = {}  # by model

    def __len__(self) -> int:
        return len(self.by_shape)

    def plan(self, name: str, table: SequenceTable, batch: DecodeRows, *, with_adapter: bool) -> StaticPlan:
        """The plan of a batch of a model, valid until the next one; ``with_adapter``: it may act on some rows only."""
        active = table.rows_of_model(batch.rows, name) if with_adapter else _NO_ROWS
        whole = not with_adapter or len(active) == len(batch.rows)
        widths = self._widths.setdefault(name, _Widths()).of_next(batch.pages)
        levels = list(zip(batch.segments, widths, strict=True))
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


class _Widths:
    """The widths of a model's page tables: powers of two that seldom become smaller, so that shapes recur."""

    def __init__(self) -> None:
        self._widths: list[int] = []  # at each depth
        self._needed: list[int] = []  # the most pages of a segment at each depth, of the plans counted
        self._before: list[int] = []  # the same of the `WIDTHS_KEPT` plans before
        self._count = 0

    def of_next(self, pages: Sequence[int]) -> list[int]:
        """The widths of a plan, of whose segments the largest at each depth have so many pages."""
        if self._count == WIDTHS_KEPT:
            self._widths, self._needed, self._before, self._count = [], [], self._needed, 0
        self._count += 1
        if len(pages) > len(self._needed) or any(map(gt, pages, self._needed)):
            self._needed = [max(both) for both in zip_longest(self._needed, pages, fillvalue=1)]
            known = zip_longest(self._needed, self._before, fillvalue=1)
            self._widths = [power_of_two(max(both)) for both in known]
        return self._widths[: len(pages)]
