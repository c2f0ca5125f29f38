"""The operations of `SequenceArrays` as C++ operators (csrc/cpu/sequence_rows.cpp)."""

from __future__ import annotations

import functools
import logging

import numpy as np
import torch

from alignpro.engine.plan_buffers import PlanBuffers
from alignpro.engine.sequence_arrays import COLUMNS, DecodeRows, Ints, SequenceArrays

logger = logging.getLogger(__name__)

_NUMBERS = {name: number for number, name in enumerate(COLUMNS.names or ())}


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

    def moved(self) -> None:
        """See `SequenceArrays.moved`: the operators read and write the same memory."""
        self._columns = torch.from_numpy(self.columns.view(np.int64).reshape(-1, len(_NUMBERS)))
        self._tokens, self._logprobs = torch.from_numpy(self.tokens), torch.from_numpy(self.logprobs)
        self._paths, self._stop_tokens = torch.from_numpy(self.paths), torch.from_numpy(self.stop_tokens)
        self._pages, self._max_pages = torch.from_numpy(self.pages), torch.from_numpy(self.max_pages)
        self._lengths, self._starts = torch.from_numpy(self.lengths), torch.from_numpy(self.starts)
        self._serials = torch.from_numpy(self.serials)

    def ordered(self, rows: Ints) -> DecodeRows:
        """See `SequenceArrays.ordered`."""
        in_order, paths, sizes = torch.ops.alignpro.order_rows.default(
            self._columns, self._paths, self._serials, self._max_pages, torch.from_numpy(rows)
        )
        return DecodeRows(in_order.numpy(), paths.numpy(), sizes.tolist())

    def fill(self, batch: DecodeRows, active: Ints, buffers: PlanBuffers) -> None:
        """See `SequenceArrays.fill`."""
        torch.ops.alignpro.fill_plan.default(
            self._columns,
            self._starts,
            self._lengths,
            self._pages,
            torch.from_numpy(batch.rows),
            torch.from_numpy(batch.paths),
            torch.from_numpy(active),
            buffers.memory,
            *buffers.layout,
        )

    def add_tokens(self, rows: Ints, tokens: torch.Tensor, logprobs: torch.Tensor) -> tuple[Ints, Ints]:
        """See `SequenceArrays.add_tokens`."""
        may_end, full = torch.ops.alignpro.add_tokens.default(
            self._columns,
            self._tokens,
            self._logprobs,
            self._stop_tokens,
            torch.from_numpy(rows),
            tokens,
            logprobs,
        )
        return may_end.numpy(), full.numpy()

    def without_room(self, forward_model: int) -> Ints:
        """See `SequenceArrays.without_room`."""
        rows: Ints = torch.ops.alignpro.rows_without_room.default(self._columns, self._serials, forward_model).numpy()
        return rows

    def add_pages(self, rows: Ints, pages: Ints, size: int) -> None:
        """See `SequenceArrays.add_pages`."""
        torch.ops.alignpro.add_pages.default(
            self._columns, self._pages, torch.from_numpy(rows), torch.from_numpy(pages), size
        )

    def same(self, column: str, rows: Ints) -> bool:
        """See `SequenceArrays.same`."""
        return bool(torch.ops.alignpro.same_in_column.default(self._columns, torch.from_numpy(rows), _NUMBERS[column]))
