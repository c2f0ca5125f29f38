"""The running sequences as rows of arrays, so that a decode batch is gathered without a loop over its sequences.

A row holds what stays the same while a sequence runs: the segments on its path and their pages. What changes with every
token, its last token and its length, is read from the sequence itself.

| owns | does not own |
|---|---|
| rows of segments and of sequences, the order of a batch | which sequences run, tensors |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignpro.engine.pool import KVPool, Segment
from alignpro.engine.prefix_tree import PrefixTree
from alignpro.engine.sequence import SampledSequence

Ints = NDArray[np.int64]

NO_SEGMENT = 0
"""The row of a segment without keys: what a path has beyond its end."""


class Level(NamedTuple):
    """The segments at one depth of the paths of N sequences."""

    reached: NDArray[np.bool_]
    """(N,) whether a sequence's path reaches this depth."""
    begins: Ints
    """(S,) the first sequence of each segment; begins[0] is 0."""
    segments: Ints
    """(S,) the row of each segment, possibly `NO_SEGMENT` for the first."""


class DecodeRows(NamedTuple):
    """N sequences in depth-first order of the prefix tree, whose paths are computed apart from their last tokens."""

    sequences: list[SampledSequence]
    output_ids: list[list[int]]
    """The sampled tokens of each sequence."""
    outputs: Ints
    """(N,) the row of the segment of each sequence's sampled tokens."""
    levels: list[Level]
    """One per depth of the paths."""


class SequenceTable:
    """Rows for the running sequences and for the segments on their paths.

    Args:
        pool: Source of the pages.
        tree: The prefix tree; its nodes may be split while sequences below them run.
    """

    def __init__(self, pool: KVPool, tree: PrefixTree) -> None:
        self.pool, self.tree = pool, tree
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self.pages = np.zeros((64, 16), np.int32)
        """(rows of segments, W): the pages of each segment, then anything."""
        self.max_pages = np.zeros(64, np.int64)
        """The number of pages that each segment has once it is complete."""
        self.lengths = np.zeros(64, np.int64)
        """Tokens of each segment that are computed; those of sampled tokens are up to the reader."""
        self.starts = np.zeros(64, np.int64)
        """Position of the first token of each segment."""
        self._serials = np.full(64, -1, np.int64)
        self._num_segments, self._free_segments = NO_SEGMENT + 1, list[int]()
        self._nodes: dict[Segment, int] = {}  # row of each node; more than those of the running sequences
        self._num_splits = self.tree.num_splits
        self._paths = np.zeros((64, 4), np.int64)  # (rows of sequences, depths): rows of segments
        self._running: dict[SampledSequence, tuple[int, int]] = {}  # its row, and that of its sampled tokens
        self._num_sequences, self._free_sequences = 0, list[int]()
        self._last: tuple[Sequence[SampledSequence], DecodeRows] | None = None  # valid while no row changes

    def add(self, sequence: SampledSequence) -> None:
        """Give a row to a sequence that begins to run."""
        output = sequence.output
        assert output is not None
        row = self._free_sequences.pop() if self._free_sequences else self._num_sequences
        self._num_sequences = max(self._num_sequences, row + 1)
        self._paths = _fit(self._paths, row)
        segment = self._add_segment(output, self.pool.pages_for(sequence.model, sequence.params.max_tokens))
        self._running[sequence] = row, segment
        sequence.row = row
        self._read_path(sequence)

    def remove(self, sequence: SampledSequence) -> None:
        """Free the row of a sequence that stops running."""
        row, segment = self._running.pop(sequence)
        self._free_sequences.append(row)
        self._free_segments.append(segment)
        self._last = None
        if not self._running:
            self.clear()  # pages may be moved now

    def add_pages(self, sequence: SampledSequence) -> None:
        """Note that a sequence has got pages for its sampled tokens."""
        assert sequence.output is not None
        self._read_pages(self._running[sequence][1], sequence.output)

    def gather(self, sequences: Sequence[SampledSequence]) -> DecodeRows:
        """Put running sequences in order, and find the segments at each depth of their paths.

        A list of sequences must not change after this call; the same list gives the same result until a row changes.
        """
        if self._num_splits != self.tree.num_splits or len(self._nodes) > 64 + 2 * len(self._running):
            self._read_paths()
        if self._last is None or self._last[0] is not sequences:
            self._last = sequences, self._ordered(sequences)
        return self._last[1]

    def _ordered(self, sequences: Sequence[SampledSequence]) -> DecodeRows:
        paths = self._paths[[sequence.row for sequence in sequences]]
        paths = paths[:, : np.count_nonzero(paths.any(0))]
        order = np.lexsort(self._serials[paths].T[::-1])
        paths, levels = paths[order], []
        for segments in paths.T:
            reached, begun = segments != NO_SEGMENT, np.ones(len(segments), np.bool_)
            begun[1:] = (segments[1:] != segments[:-1]) & reached[1:]
            levels.append(Level(reached, begins := np.flatnonzero(begun), segments[begins]))
        ends = np.count_nonzero(paths, axis=1) - 1
        ordered = [sequences[i] for i in order.tolist()]
        return DecodeRows(
            ordered, [sequence.output_ids for sequence in ordered], paths[np.arange(len(paths)), ends], levels
        )

    def _read_paths(self) -> None:
        """Read the paths of all sequences, some of which may have changed."""
        self._free_segments += self._nodes.values()
        self._nodes.clear()
        self._num_splits = self.tree.num_splits
        for sequence in self._running:
            self._read_path(sequence)

    def _read_path(self, sequence: SampledSequence) -> None:
        assert sequence.node is not None
        row, segment = self._running[sequence]
        path = []
        for node in sequence.node.path():
            if node not in self._nodes:
                self._nodes[node] = self._add_segment(node, self.pool.pages_for(node.model, len(node.tokens)))
            path.append(self._nodes[node])
        if len(path) >= self._paths.shape[1]:
            self._paths = np.pad(self._paths, ((0, 0), (0, len(path))))
        self._paths[row] = NO_SEGMENT
        self._paths[row, : len(path) + 1] = [*path, segment]
        self._last = None

    def _add_segment(self, segment: Segment, max_pages: int) -> int:
        row = self._free_segments.pop() if self._free_segments else self._num_segments
        self._num_segments = max(self._num_segments, row + 1)
        if row >= len(self.pages):
            self.pages, self.max_pages, self.lengths, self.starts, self._serials = (
                _fit(array, row) for array in (self.pages, self.max_pages, self.lengths, self.starts, self._serials)
            )
        self.max_pages[row], self.starts[row], self._serials[row] = max_pages, segment.start, segment.serial
        self.lengths[row] = len(segment.tokens)
        self._read_pages(row, segment)
        return row

    def _read_pages(self, row: int, segment: Segment) -> None:
        count = len(segment.pages)
        if count > self.pages.shape[1]:
            self.pages = np.pad(self.pages, ((0, 0), (0, count)))
        self.pages[row, :count] = segment.pages


def _fit(array: NDArray[Any], row: int) -> NDArray[Any]:
    """The array, with twice as many rows if it does not have this one."""
    if row < len(array):
        return array
    return np.pad(array, ((0, len(array)), *[(0, 0)] * (array.ndim - 1)))
