"""The running sequences as rows of arrays, so that a step reads and updates all of them without a loop over sequences.

A row holds what a step needs of a sequence: the segments on its path, how it is sampled, how many tokens it has drawn
and how many its pages hold. Drawn tokens are kept here until somebody reads them: most are read all at once, when the
sequence ends.

| owns | does not own |
|---|---|
| rows of segments and of sequences, the tokens not read yet | which sequences run, what a step does with the arrays |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from alignpro.engine.cpp_sequence_arrays import new_sequence_arrays
from alignpro.engine.pool import KVPool, Segment
from alignpro.engine.prefix_tree import PrefixTree
from alignpro.engine.sampler import seed_state
from alignpro.engine.sequence import SampledSequence
from alignpro.engine.sequence_arrays import NO_SEGMENT, DecodeRows, Ints
from alignpro.engine.types import SamplingParams

UNREAD = 256
"""Number of tokens of each sequence that are kept: it is read before they are overwritten."""


class SequenceTable:
    """Rows for the running sequences and for the segments on their paths.

    Args:
        pool: Source of the pages.
        tree: The prefix tree; its nodes may be split while sequences below them run.
    """

    def __init__(self, pool: KVPool, tree: PrefixTree) -> None:
        self.pool, self.tree = pool, tree
        self._model_numbers = {name: number for number, name in enumerate(pool.page_size)}
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self._sequences: list[SampledSequence | None] = []  # by row
        self.arrays = new_sequence_arrays(UNREAD)
        self._num_segments, self._free_segments = NO_SEGMENT + 1, list[int]()
        self._nodes: dict[Segment, int] = {}  # row of each node; more than those of the running sequences
        self._num_splits = self.tree.num_splits
        self._running: dict[SampledSequence, None] = {}
        self._free_sequences = list[int]()
        self._samplings: dict[tuple[int | float, ...], int] = {}  # what two that are drawn alike have in common
        self._last: DecodeRows | None = None  # valid while no row changes

    def add(self, sequence: SampledSequence) -> None:
        """Give a row to a sequence that begins to run."""
        output, params, tokens = sequence.output, sequence.params, sequence.output_ids
        assert output is not None
        if not self._free_sequences:
            self._sequences.append(None)
            self._free_sequences.append(len(self._sequences) - 1)
            self.arrays.fit_sequence(len(self._sequences) - 1)
        sequence.row = row = self._free_sequences.pop()
        number, size = self._model_numbers[sequence.model], self.pool.page_size[sequence.model]
        self.arrays.columns[row] = (
            self._add_segment(output, self.pool.pages_for(sequence.model, params.max_tokens)),
            seed_state(sequence.seed),
            len(tokens),
            tokens[-1] if tokens else 0,
            len(output.pages) * size,
            (output.pages[-1] - (len(output.pages) - 1)) * size if output.pages else 0,
            0 if params.stop else params.max_tokens,
            0,  # see `_read_path`
            number,
            self._model_numbers[sequence.forward_model],
            self._sampling(number, params),
        )
        self.arrays.max_tokens[row] = params.max_tokens
        self.arrays.add_stop_tokens(params.stop_token_ids)
        self._sequences[row], self._running[sequence] = sequence, None
        sequence.unread = self
        self._read_path(sequence)

    def remove(self, sequence: SampledSequence) -> None:
        """Free the row of a sequence that stops running."""
        self.read_tokens(sequence)
        row, sequence.unread = sequence.row, None
        del self._running[sequence]
        self._free_sequences.append(row)
        self._free_segments.append(int(self.arrays.columns["segment"][row]))
        self._sequences[row], self.arrays.columns["count"][row] = None, 0
        self._last = None
        if not self._running:
            self.clear()  # pages may be moved now

    def sequences(self, rows: Ints) -> list[SampledSequence]:
        """The sequences of N rows."""
        return [sequence for row in rows.tolist() if (sequence := self._sequences[row]) is not None]

    def rows_of_model(self, rows: Ints, model: str) -> Ints:
        """The places, in ``rows``, of the sequences of a model."""
        return np.flatnonzero(self.arrays.columns["model"][rows] == self._model_numbers[model])

    def counts(self, rows: Ints) -> Ints:
        """The number of tokens that each of N sequences has drawn, (N,)."""
        return self.arrays.columns["count"].take(rows)

    def seeds(self, rows: Ints) -> Ints:
        """The seed of the next token of each of N sequences, (N,)."""
        return self.arrays.seeds(rows)

    def without_room(self, forward_model: str) -> tuple[Ints, bool]:
        """The sequences of a model's batches whose pages do not hold all their tokens, oldest first.

        Returns:
            Their rows, (N,); whether all are sampled from the same model.
        """
        return self.arrays.without_room(self._model_numbers[forward_model])

    def sampled_alike(self, rows: Ints) -> bool:
        """Whether N sequences have the same model and are drawn in the same way."""
        if self._last is not None and self._last.rows is rows:
            return self._last.alike
        return self.arrays.drawn_alike(rows)

    def add_pages(self, sequences: Sequence[SampledSequence], rows: Ints, pages: Sequence[int]) -> None:
        """Give another page for its sampled tokens to each of N sequences of the same model, whose rows are given too."""
        for sequence, page in zip(sequences, pages, strict=True):
            assert sequence.output is not None
            sequence.output.pages.append(page)
        self.arrays.add_pages(rows, pages, self.pool.page_size[sequences[0].model])

    def add_tokens(self, rows: Ints, tokens: Tensor, logprobs: Tensor) -> tuple[list[SampledSequence], float]:
        """Add a token to each of N sequences, unless the sum of the log-probabilities is not finite.

        If this raises an `Exception`, no sequence has got one.

        Args:
            rows: (N,).
            tokens: (N,) int64, on the CPU.
            logprobs: (N,) float32 or float64, on the CPU.

        Returns:
            All sequences that may end with it, and possibly others; the sum.
        """
        may_end, full, total = self.arrays.add_tokens(rows, tokens, logprobs)
        for row in full:  # before the tokens are overwritten
            if (sequence := self._sequences[row]) is not None:
                self.read_tokens(sequence)
        return [sequence for row in may_end if (sequence := self._sequences[row]) is not None], total

    def ends_with_next(self, rows: Ints) -> NDArray[np.bool_]:
        """Whether each of N sequences ends with its next token, whatever that is, (N,)."""
        ends: NDArray[np.bool_] = self.counts(rows) + 1 >= self.arrays.max_tokens[rows]
        return ends

    def presume(self, rows: Ints, tokens: int) -> None:
        """Count 1 more token of each of N sequences, which is not here yet, or −1: no more.

        While it is counted, no token can be read.
        """
        self.arrays.columns["count"][rows] += tokens

    def read_tokens(self, sequence: SampledSequence) -> None:
        """See `UnreadTokens`. If an interrupt has cleared the table, there are none."""
        row = sequence.row
        if row >= len(self._sequences) or self._sequences[row] is not sequence:
            return
        count = int(self.arrays.columns["count"][row])
        if len(sequence.read_ids) == count == len(sequence.read_logprobs):
            return
        lists: list[tuple[list[Any], NDArray[Any]]] = [
            (sequence.read_ids, self.arrays.tokens),
            (sequence.read_logprobs, self.arrays.logprobs),
        ]
        for read, kept in lists:  # each by itself, so that this may be interrupted and repeated
            if len(read) < count:
                first, end = len(read) % UNREAD, (count - 1) % UNREAD + 1
                wraps = first >= end
                read += (np.append(kept[row, first:], kept[row, :end]) if wraps else kept[row, first:end]).tolist()

    def read_newest(self, rows: Ints) -> None:
        """Read the newest token of N sequences whose others have been read, at a tenth of the time of reading each alone."""
        counts = self.counts(rows)
        places = (counts - 1) % UNREAD
        tokens, logprobs = (kept[rows, places].tolist() for kept in (self.arrays.tokens, self.arrays.logprobs))
        for sequence, count, token, logprob in zip(
            self.sequences(rows), counts.tolist(), tokens, logprobs, strict=True
        ):
            if len(sequence.read_ids) == count - 1:  # each by itself, as in `read_tokens`
                sequence.read_ids.append(token)
            if len(sequence.read_logprobs) == count - 1:
                sequence.read_logprobs.append(logprob)

    def gather(self, rows: Ints) -> DecodeRows:
        """Put N > 0 running sequences in order, and find the segments at each depth of their paths.

        The arrays must not change after this call; the rows of a result give the same result until a row changes.
        """
        if self._num_splits != self.tree.num_splits or len(self._nodes) > 64 + 2 * len(self._running):
            self._read_paths()
        if self._last is None or self._last.rows is not rows:
            self._last = self.arrays.ordered(rows)
        return self._last

    def audit(self) -> None:
        """Check that the rows of sequences agree with their tokens and pages.

        Raises:
            AssertionError: They do not.
        """
        for sequence in self._running:
            own, output, tokens = self.arrays.columns[sequence.row], sequence.output, sequence.output_ids
            assert self._sequences[sequence.row] is sequence and sequence.unread is self and output is not None
            assert own["room"] == len(output.pages) * self.pool.page_size[sequence.model]
            assert len(sequence.logprobs) == len(tokens) == own["count"] and [*tokens, 0][-2:][0] == own["last_token"]
            assert self.arrays.pages[own["segment"]][: len(output.pages)].tolist() == output.pages
            if 0 < len(tokens) <= own["room"]:
                last = len(tokens) - 1
                assert [own["slots_from"] + last] == self.pool.slots(sequence.model, output.pages, last, 1)

    def _read_paths(self) -> None:
        """Read the paths of all sequences, some of which may have changed."""
        self._free_segments += self._nodes.values()
        self._nodes.clear()
        self._num_splits = self.tree.num_splits
        for sequence in self._running:
            self._read_path(sequence)

    def _read_path(self, sequence: SampledSequence) -> None:
        assert sequence.node is not None
        row, path = sequence.row, []
        for node in sequence.node.path():
            if node not in self._nodes:
                self._nodes[node] = self._add_segment(node, self.pool.pages_for(node.model, len(node.tokens)))
            path.append(self._nodes[node])
        arrays = self.arrays
        path.append(int(arrays.columns["segment"][row]))
        arrays.fit_sequence(row, len(path))
        arrays.paths[:, row] = NO_SEGMENT
        arrays.paths[: len(path), row] = path
        arrays.columns["depth"][row] = len(path)
        self._last = None

    def _sampling(self, model: int, params: SamplingParams) -> int:
        """A number that two have in common if they are drawn alike; clients of a server may ask for ever new temperatures."""
        if len(self._samplings) > 64 + 2 * len(self._running):
            self._samplings.clear()
            for sequence in self._running:
                numbered = self._sampling(self._model_numbers[sequence.model], sequence.params)
                self.arrays.columns["sampling"][sequence.row] = numbered
        recorded = -1 if params.top_logprobs is None else params.top_logprobs
        key = model, params.temperature, params.top_k, params.top_p, params.min_p, recorded
        return self._samplings.setdefault(key, len(self._samplings))

    def _add_segment(self, segment: Segment, max_pages: int) -> int:
        row = self._free_segments.pop() if self._free_segments else self._num_segments
        self._num_segments = max(self._num_segments, row + 1)
        arrays = self.arrays
        arrays.fit_segment(row, max(max_pages, len(segment.pages)))
        arrays.max_pages[row], arrays.starts[row], arrays.serials[row] = max_pages, segment.start, segment.serial
        arrays.lengths[row] = len(segment.tokens)
        arrays.pages[row, : len(segment.pages)] = segment.pages
        return row
