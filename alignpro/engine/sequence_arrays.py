"""The arrays behind the `SequenceTable`, and what a step does with all running sequences at once, in NumPy.

A step makes a few calls here, whose time is the host's part of it. Where the C++ operators run, `cpp_sequence_arrays` does
the same with them, and its results have the same bits.

| owns | does not own |
|---|---|
| the memory of rows, their order in a batch, the inputs of a step | which row belongs to whom, devices |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from alignpro.engine.plan_buffers import PlanBuffers
from alignpro.engine.sampler import position_seeds

Ints = NDArray[np.int64]

NO_SEGMENT = 0
"""The row of a segment without keys: what a path has beyond its end."""

COLUMNS = np.dtype(
    [
        ("segment", np.int64),  # the row of the segment of its sampled tokens
        ("seed_state", np.uint64),  # see `sampler.seed_state`
        ("count", np.int64),  # of sampled tokens
        ("last_token", np.int64),
        ("room", np.int64),  # number of sampled tokens that its pages hold
        ("slots_from", np.int64),  # token i, on the last page, has slot ``slots_from + i``
        ("may_end_at", np.int64),  # the number of tokens from which it may end, whatever they are
        ("depth", np.int64),  # number of segments on its path
        ("model", np.int64),  # the number of its model
        ("forward_model", np.int64),  # the number of the model in whose forward passes it runs
        ("sampling", np.int64),  # equal for two that have the same model and are drawn in the same way
    ]
)
"""The columns of sequences, in the order in which csrc/cpu/sequence_rows.cpp numbers them."""


class DecodeRows(NamedTuple):
    """N sequences in depth-first order of the prefix tree, whose paths are computed apart from their last tokens."""

    rows: Ints
    """(N,) the row of each sequence."""
    paths: Ints
    """(D, N) the row of each sequence's segment at each depth, or `NO_SEGMENT`; C-contiguous."""
    segments: list[int]
    """D: the number of segments at each depth."""
    pages: list[int]
    """D: the most pages that one of them has once it is complete."""
    alike: bool
    """Whether all have the same model and are drawn in the same way."""


class SequenceArrays:
    """Rows for R sequences and S segments; all arrays grow as needed.

    Args:
        unread: Number of drawn tokens of each sequence that are kept: it is read before they are overwritten.
    """

    def __init__(self, unread: int) -> None:
        self.columns = np.zeros(64, COLUMNS)
        """(R,): see `COLUMNS`."""
        self.max_tokens = np.zeros(64, np.int64)
        """(R,): the number of tokens with which a sequence ends, whatever they are."""
        self.tokens = np.zeros((64, unread), np.int64)
        """(R, unread): token i of a sequence is at i modulo ``unread``."""
        self.logprobs = np.zeros((64, unread))
        """(R, unread) float64: their log-probabilities, in nats."""
        self.paths = np.zeros((4, 64), np.int64)
        """(D, R): the segment at each depth of a sequence's path."""
        self._stops: set[int] = set()
        self.stop_tokens = np.zeros(0, np.int64)
        """The tokens that may end a sequence."""
        self.pages = np.zeros((64, 16), np.int32)
        """(S, W): the pages of each segment, then anything."""
        self.max_pages = np.zeros(64, np.int64)
        """(S,): the number of pages that each segment has once it is complete."""
        self.lengths = np.zeros(64, np.int64)
        """(S,): tokens of each segment that are computed; those of sampled tokens are written by `fill`."""
        self.starts = np.zeros(64, np.int64)
        """(S,): position of the first token of each segment."""
        self.serials = np.full(64, -1, np.int64)
        """(S,): `Segment.serial`; −1 for `NO_SEGMENT`."""
        self.moved()

    def moved(self) -> None:
        """Note that an array has been replaced."""

    def fit_sequence(self, row: int, depth: int = 0) -> None:
        """Make room for the row of a sequence whose path has ``depth`` segments."""
        if row >= len(self.columns):
            self.columns, self.max_tokens, self.tokens, self.logprobs = (
                _fit(array, row) for array in (self.columns, self.max_tokens, self.tokens, self.logprobs)
            )
            self.paths = _fit(self.paths, row, axis=1)
            self.moved()
        if depth > len(self.paths):
            self.paths = _fit(self.paths, depth - 1)
            self.moved()

    def fit_segment(self, row: int, pages: int) -> None:
        """Make room for the row of a segment that will have so many pages."""
        if row >= len(self.pages):
            self.pages, self.max_pages, self.lengths, self.starts, self.serials = (
                _fit(array, row) for array in (self.pages, self.max_pages, self.lengths, self.starts, self.serials)
            )
            self.moved()
        if pages > self.pages.shape[1]:
            self.pages = _fit(self.pages, pages - 1, axis=1)
            self.moved()

    def add_stop_tokens(self, tokens: tuple[int, ...]) -> None:
        """Note tokens that may end a sequence."""
        if not self._stops.issuperset(tokens):
            self._stops.update(tokens)
            self.stop_tokens = np.array(sorted(self._stops), np.int64)
            self.moved()

    def ordered(self, rows: Ints) -> DecodeRows:
        """Put N > 0 sequences in the depth-first order of their paths."""
        depth = int(self.columns["depth"][rows].max())
        paths = self.paths[:depth].take(rows, axis=1)  # (D, N)
        order = np.lexsort(self.serials[paths[::-1]])
        paths = paths.take(order, axis=1)
        segments = [path[_begins(path)] for path in paths]
        pages = [int(self.max_pages[each].max()) for each in segments]
        return DecodeRows(rows[order], paths, [*map(len, segments)], pages, self.drawn_alike(rows))

    def seeds(self, rows: Ints) -> Ints:
        """The seed of the next token of each of N sequences, (N,)."""
        return position_seeds(self.columns["seed_state"][rows], self.columns["count"][rows])

    def fill(self, batch: DecodeRows, active: Ints, buffers: PlanBuffers) -> None:
        """Write the inputs of a step into a buffer on the host.

        Args:
            batch: The sequences; they fit in the buffer.
            active: The places of the rows that a token LoRA acts on; empty if it acts on all or on none.
            buffers: Where the inputs are written. Of the table of a level, only the rows of its segments are.
        """
        host, count, padded = buffers.arrays, len(batch.rows), buffers.shape.rows
        outputs, counts = self.columns["segment"][batch.rows], self.columns["count"][batch.rows]
        last = counts - 1
        at = self.starts[outputs] + last
        self.lengths[outputs] = counts
        host.ids[:count], host.ids[count:] = self.columns["last_token"][batch.rows], 0
        host.positions[:count], host.positions[count:] = at, 0
        host.slots[:count], host.slots[count:] = self.columns["slots_from"][batch.rows] + last, -1
        host.seeds[:count], host.seeds[count:] = self.seeds(batch.rows), 0
        host.active[: len(active)], host.active[len(active) :] = active, padded - 1
        for level, path in zip(host.levels, batch.paths, strict=True):
            begins = _begins(path)
            own, segments = path[begins], len(begins)
            level.query_positions[:count] = np.where(path != NO_SEGMENT, at, -1)
            level.query_positions[count:] = -1
            # A row without a segment at this level is counted with the preceding segment: at query position −1 it attends
            # to none of that segment's keys.
            level.cu_queries[:segments], level.cu_queries[segments:] = begins, padded
            level.key_lengths[:segments] = self.lengths[own]
            level.key_starts[:segments] = self.starts[own]
            width = min(level.page_table.shape[1], self.pages.shape[1])
            level.page_table[:segments, :width] = self.pages.take(own, axis=0)[:, :width]

    def add_tokens(self, rows: Ints, tokens: Tensor, logprobs: Tensor) -> tuple[list[int], list[int], float]:
        """Add a token to each of N sequences, unless the sum of the log-probabilities is not finite.

        Args:
            rows: (N,).
            tokens: (N,) int64, on the CPU.
            logprobs: (N,) float32 or float64, on the CPU.

        Returns:
            The rows of all sequences that may end with it, and possibly of others; those of sequences whose kept tokens must
            be read before the next one is added; the sum.
        """
        total = float(logprobs.double().sum())
        if not math.isfinite(total):
            return [], [], total
        drawn, counts = tokens.numpy(), self.columns["count"][rows]
        places = counts % self.tokens.shape[1]
        self.tokens[rows, places], self.logprobs[rows, places] = drawn, logprobs.numpy()
        counts += 1
        self.columns["last_token"][rows] = drawn
        self.columns["count"][rows] = counts
        may_end = (self.stop_tokens[:, None] == drawn).any(0) | (counts >= self.columns["may_end_at"][rows])
        return rows[may_end].tolist(), rows[counts % self.tokens.shape[1] == 0].tolist(), total

    def without_room(self, forward_model: int) -> tuple[Ints, bool]:
        """The sequences of a model's batches whose pages do not hold all their tokens, oldest first.

        Returns:
            Their rows, (N,); whether all are sampled from the same model.
        """
        full = (self.columns["count"] > self.columns["room"]) & (self.columns["forward_model"] == forward_model)
        (rows,) = full.nonzero()
        models = self.columns["model"][rows]
        return rows[self.serials[self.columns["segment"][rows]].argsort()], bool((models == models[:1]).all())

    def add_pages(self, rows: Ints, pages: Sequence[int], size: int) -> None:
        """Give another page, which holds ``size`` tokens, to each of N sequences, whose segments have room for it."""
        room, new = self.columns["room"][rows], np.array(pages, np.int64)
        self.pages[self.columns["segment"][rows], room // size] = new
        self.columns["slots_from"][rows] = new * size - room
        self.columns["room"][rows] = room + size

    def drawn_alike(self, rows: Ints) -> bool:
        """Whether N sequences have the same model and are drawn in the same way."""
        sampling = self.columns["sampling"][rows]
        return bool((sampling == sampling[:1]).all())


def _begins(path: Ints) -> Ints:
    """The first sequence of each segment at a depth, (S,); the first of all even if it has none there."""
    begun = path != NO_SEGMENT
    begun[1:] &= path[1:] != path[:-1]
    begun[0] = True
    return begun.nonzero()[0]


def _fit(array: NDArray[Any], index: int, axis: int = 0) -> NDArray[Any]:
    """The array, at least twice as long along an axis if it does not have this index."""
    length = array.shape[axis]
    if index < length:
        return array
    more = max(index + 1, 2 * length) - length
    return np.pad(array, [(0, more if each == axis else 0) for each in range(array.ndim)])
