"""The operations of `SequenceArrays` as C++ operators (csrc/cpu/sequence_rows.cpp)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from alignpro.engine.plan_buffers import PlanBuffers
from alignpro.engine.sequence_arrays import COLUMNS, DecodeRows, Ints, SequenceArrays

logger = logging.getLogger(__name__)

_NONE = torch.zeros(0, dtype=torch.int64)


def new_sequence_arrays(unread: int) -> SequenceArrays:
    """The fastest `SequenceArrays` of this machine, which is logged once; for the argument, see there."""
    return CppSequenceArrays(unread) if _has_operators() else SequenceArrays(unread)


@functools.cache
def _has_operators() -> bool:
    from alignpro_kernels import cpp_library  # imported lazily: torch.utils.cpp_extension is slow to import

    reason = cpp_library.unavailable()
    logger.info("the steps of the engine are planned by %s", "C++" if reason is None else f"NumPy: {reason}")
    return reason is None


class CppSequenceArrays(SequenceArrays):
    """See `SequenceArrays`; the library of C++ operators must be loaded."""

    def __init__(self, unread: int) -> None:
        super().__init__(unread)
        self._last: tuple[Ints, Tensor, Tensor] | None = None  # rows and their tensor, and the paths, of the last order

    def moved(self) -> None:
        """See `SequenceArrays.moved`: the operators read and write the same memory."""
        self._columns = torch.from_numpy(self.columns.view(np.int64).reshape(-1, len(COLUMNS.fields or ())))
        self._tokens, self._logprobs = torch.from_numpy(self.tokens), torch.from_numpy(self.logprobs)
        self._paths, self._stop_tokens = torch.from_numpy(self.paths), torch.from_numpy(self.stop_tokens)
        self._pages, self._max_pages = torch.from_numpy(self.pages), torch.from_numpy(self.max_pages)
        self._lengths, self._starts = torch.from_numpy(self.lengths), torch.from_numpy(self.starts)
        self._serials = torch.from_numpy(self.serials)

    def ordered(self, rows: Ints) -> DecodeRows:
        """See `SequenceArrays.ordered`."""
        in_order, paths, segments, pages, alike = torch.ops.alignpro.order_rows.default(
            self._columns, self._paths, self._serials, self._max_pages, self._tensor(rows)
        )
        batch = DecodeRows(in_order.numpy(), paths.numpy(), segments, pages, alike)
        self._last = batch.rows, in_order, paths
        return batch

    def seeds(self, rows: Ints) -> Ints:
        """See `SequenceArrays.seeds`."""
        seeds: Ints = torch.ops.alignpro.next_seeds.default(self._columns, self._tensor(rows)).numpy()
        return seeds

    def fill(self, batch: DecodeRows, active: Ints, buffers: PlanBuffers) -> None:
        """See `SequenceArrays.fill`."""
        last = self._last
        torch.ops.alignpro.fill_plan.default(
            self._columns,
            self._starts,
            self._lengths,
            self._pages,
            self._tensor(batch.rows),
            last[2] if last is not None and last[0] is batch.rows else torch.from_numpy(batch.paths),
            torch.from_numpy(active) if len(active) else _NONE,
            buffers.memory,
            *buffers.layout,
        )

    def add_tokens(self, rows: Ints, tokens: Tensor, logprobs: Tensor) -> tuple[list[int], list[int], float]:
        """See `SequenceArrays.add_tokens`."""
        added: tuple[list[int], list[int], float] = torch.ops.alignpro.add_tokens.default(
            self._columns,
            self._tokens,
            self._logprobs,
            self._stop_tokens,
            self._tensor(rows),
            tokens,
            logprobs,
        )
        return added

    def without_room(self, forward_model: int) -> tuple[Ints, bool]:
        """See `SequenceArrays.without_room`."""
        rows, alike = torch.ops.alignpro.rows_without_room.default(self._columns, self._serials, forward_model)
        return rows.numpy(), alike

    def add_pages(self, rows: Ints, pages: Sequence[int], size: int) -> None:
        """See `SequenceArrays.add_pages`."""
        torch.ops.alignpro.add_pages.default(self._columns, self._pages, self._tensor(rows), pages, size)

    def drawn_alike(self, rows: Ints) -> bool:
        """See `SequenceArrays.drawn_alike`."""
        return bool(torch.ops.alignpro.drawn_alike.default(self._columns, self._tensor(rows)))

    def _tensor(self, rows: Ints) -> Tensor:
        return self._last[1] if self._last is not None and self._last[0] is rows else torch.from_numpy(rows)
