"""The running sequences as rows of arrays, so that a step reads and updates all of them without a loop over sequences.

A row holds what a step needs of a sequence: the segments on its path, how it is sampled, how many tokens it has drawn
and how many its pages hold. Drawn tokens are kept here until somebody reads them: most are read all at once, when the
sequence ends.

| owns | does not own |
|---|---|
| rows of segments and of sequences, the tokens not read yet, the order of a batch | which sequences run, tensors |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignpro.engine.pool import KVPool, Segment
from alignpro.engine.prefix_tree import PrefixTree
from alignpro.engine.sampler import seed_state
from alignpro.engine.sequence import SampledSequence
from alignpro.engine.types import SamplingParams

Ints = NDArray[np.int64]

NO_SEGMENT = 0
"""The row of a segment without keys: what a path has beyond its end."""

UNREAD = 256
"""Number of tokens of each sequence that are kept: it is read before they are overwritten."""

_COLUMNS = np.dtype(
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
"""The columns of sequences."""


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

    rows: Ints
    """(N,) the row of each sequence."""
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
        self._model_numbers = {name: number for number, name in enumerate(pool.page_size)}
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
        self.columns = np.zeros(64, _COLUMNS)
        """(rows of sequences,): see `_COLUMNS`."""
        self._tokens = np.zeros((64, UNREAD), np.int64)  # (rows of sequences, position modulo `UNREAD`)
        self._logprobs = np.zeros((64, UNREAD))
        self._paths = np.zeros((4, 64), np.int64)  # (depths, rows of sequences): rows of segments
        self._sequences: list[SampledSequence | None] = []  # by row
        self._running: dict[SampledSequence, None] = {}
        self._free_sequences = list[int]()
        self._samplings: dict[tuple[int | float, ...], int] = {}  # what two that are drawn alike have in common
        self._stop_tokens = np.zeros(0, np.int64)  # of all sequences that have run
        self._last: tuple[Ints, DecodeRows] | None = None  # valid while no row changes

    def add(self, sequence: SampledSequence) -> None:
        """Give a row to a sequence that begins to run."""
        output, params, tokens = sequence.output, sequence.params, sequence.output_ids
        assert output is not None
        if not self._free_sequences:
            self._sequences.append(None)
            self._free_sequences.append(len(self._sequences) - 1)
            self.columns, self._tokens, self._logprobs = (
                _fit(array, len(self._sequences) - 1) for array in (self.columns, self._tokens, self._logprobs)
            )
            self._paths = _fit(self._paths, len(self._sequences) - 1, axis=1)
        sequence.row = row = self._free_sequences.pop()
        number, size = self._model_numbers[sequence.model], self.pool.page_size[sequence.model]
        self.columns[row] = (
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
        if not set(params.stop_token_ids).issubset(self._stop_tokens.tolist()):
            self._stop_tokens = np.union1d(self._stop_tokens, params.stop_token_ids)
        self._sequences[row], self._running[sequence] = sequence, None
        sequence.unread = self
        self._read_path(sequence)

    def remove(self, sequence: SampledSequence) -> None:
        """Free the row of a sequence that stops running."""
        self.read_tokens(sequence)
        row, sequence.unread = sequence.row, None
        del self._running[sequence]
        self._free_sequences.append(row)
        self._free_segments.append(int(self.columns["segment"][row]))
        self._sequences[row], self.columns["count"][row] = None, 0
        self._last = None
        if not self._running:
            self.clear()  # pages may be moved now

    def sequences(self, rows: Ints) -> list[SampledSequence]:
        """The sequences of N rows."""
        return [sequence for row in rows.tolist() if (sequence := self._sequences[row]) is not None]

    def rows_of_model(self, rows: Ints, model: str) -> Ints:
        """The places, in ``rows``, of the sequences of a model."""
        return np.flatnonzero(self.columns["model"][rows] == self._model_numbers[model])

    def without_room(self, forward_model: str) -> Ints:
        """The sequences of a model's batches whose pages do not hold all their tokens, oldest first; their rows, (N,)."""
        number = self._model_numbers[forward_model]
        full = (self.columns["count"] > self.columns["room"]) & (self.columns["forward_model"] == number)
        (rows,) = full.nonzero()
        return rows[self._serials[self.columns["segment"][rows]].argsort()]

    def same_model(self, rows: Ints) -> bool:
        """Whether N sequences are sampled from the same model."""
        models = self.columns["model"][rows].tolist()
        return models.count(models[0]) == len(models)

    def add_pages(self, rows: Ints, pages: Sequence[int]) -> None:
        """Give another page for its sampled tokens to each of N sequences of the same model."""
        sequences = self.sequences(rows)
        for sequence, page in zip(sequences, pages, strict=True):
            assert sequence.output is not None
            sequence.output.pages.append(page)
        size, new = self.pool.page_size[sequences[0].model], np.array(pages)
        room = self.columns["room"][rows]
        places = room // size
        self.pages = _fit(self.pages, int(places.max()), axis=1)
        self.pages[self.columns["segment"][rows], places] = new
        self.columns["slots_from"][rows] = new * size - room
        self.columns["room"][rows] = room + size

    def add_tokens(self, rows: Ints, tokens: Ints, logprobs: NDArray[Any]) -> Ints:
        """Add a token to each of N sequences. If this raises, no sequence has got one.

        Returns:
            The places, in ``rows``, of all sequences that may end with it, and possibly of others.
        """
        counts = self.columns["count"][rows]
        places = counts % UNREAD
        for sequence in self.sequences(rows[places == 0]):
            self.read_tokens(sequence)  # before the tokens are overwritten
        self._tokens[rows, places], self._logprobs[rows, places] = tokens, logprobs
        counts += 1
        may_end = (self._stop_tokens[:, None] == tokens).any(0) | (counts >= self.columns["may_end_at"][rows])
        self.columns["last_token"][rows] = tokens
        self.columns["count"][rows] = counts
        return may_end.nonzero()[0]

    def read_tokens(self, sequence: SampledSequence) -> None:
        """See `UnreadTokens`. If an interrupt has cleared the table, there are none."""
        row = sequence.row
        if row >= len(self._sequences) or self._sequences[row] is not sequence:
            return
        count = int(self.columns["count"][row])
        if len(sequence.read_ids) == count == len(sequence.read_logprobs):
            return
        lists: list[tuple[list[Any], NDArray[Any]]] = [
            (sequence.read_ids, self._tokens),
            (sequence.read_logprobs, self._logprobs),
        ]
        for read, kept in lists:  # each by itself, so that this may be interrupted and repeated
            if len(read) < count:
                first, end = len(read) % UNREAD, (count - 1) % UNREAD + 1
                wraps = first >= end
                read += (np.append(kept[row, first:], kept[row, :end]) if wraps else kept[row, first:end]).tolist()

    def read_newest(self, rows: Ints) -> None:
        """Read the newest token of N sequences whose others have been read, at a tenth of the time of reading each alone."""
        counts = self.columns["count"][rows]
        places = (counts - 1) % UNREAD
        tokens, logprobs = self._tokens[rows, places].tolist(), self._logprobs[rows, places].tolist()
        for sequence, count, token, logprob in zip(
            self.sequences(rows), counts.tolist(), tokens, logprobs, strict=True
        ):
            if len(sequence.read_ids) == count - 1:  # each by itself, as in `read_tokens`
                sequence.read_ids.append(token)
            if len(sequence.read_logprobs) == count - 1:
                sequence.read_logprobs.append(logprob)

    def sampled_alike(self, rows: Ints) -> bool:
        """Whether sequences have the same model and are drawn in the same way."""
        sampling = self.columns["sampling"][rows]
        return bool((sampling == sampling[0]).all())

    def gather(self, rows: Ints) -> DecodeRows:
        """Put running sequences in order, and find the segments at each depth of their paths.

        The array must not change after this call; the same array gives the same result until a row changes.
        """
        if self._num_splits != self.tree.num_splits or len(self._nodes) > 64 + 2 * len(self._running):
            self._read_paths()
        if self._last is None or self._last[0] is not rows:
            self._last = rows, self._ordered(rows)
        return self._last[1]

    def audit(self) -> None:
        """Check that the rows of sequences agree with their tokens and pages.

        Raises:
            AssertionError: They do not.
        """
        for sequence in self._running:
            own, output, tokens = self.columns[sequence.row], sequence.output, sequence.output_ids
            assert self._sequences[sequence.row] is sequence and sequence.unread is self and output is not None
            assert own["room"] == len(output.pages) * self.pool.page_size[sequence.model]
            assert len(sequence.logprobs) == len(tokens) == own["count"] and [*tokens, 0][-2:][0] == own["last_token"]
            assert self.pages[own["segment"]][: len(output.pages)].tolist() == output.pages
            if 0 < len(tokens) <= own["room"]:
                last = len(tokens) - 1
                assert [own["slots_from"] + last] == self.pool.slots(sequence.model, output.pages, last, 1)

    def _ordered(self, rows: Ints) -> DecodeRows:
        depth = int(self.columns["depth"][rows].max())
        paths = self._paths[:depth].take(rows, axis=1)  # (D, N)
        order = np.lexsort(self._serials[paths[::-1]])
        rows, paths = rows[order], paths.take(order, axis=1)
        reached = paths != NO_SEGMENT
        begun = reached.copy()
        begun[:, 1:] &= paths[:, 1:] != paths[:, :-1]
        begun[:, 0] = True
        places = [row.nonzero()[0] for row in begun]
        levels = [Level(reached[i], begins, paths[i, begins]) for i, begins in enumerate(places)]
        return DecodeRows(rows, self.columns["segment"][rows], levels)

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
        self._paths = _fit(self._paths, len(path))
        self._paths[:, row] = NO_SEGMENT
        self._paths[: len(path) + 1, row] = [*path, self.columns["segment"][row]]
        self.columns["depth"][row] = len(path) + 1
        self._last = None

    def _sampling(self, model: int, params: SamplingParams) -> int:
        """A number that two have in common if they are drawn alike; clients of a server may ask for ever new temperatures."""
        if len(self._samplings) > 64 + 2 * len(self._running):
            self._samplings.clear()
            for sequence in self._running:
                numbered = self._sampling(self._model_numbers[sequence.model], sequence.params)
                self.columns["sampling"][sequence.row] = numbered
        recorded = -1 if params.top_logprobs is None else params.top_logprobs
        key = model, params.temperature, params.top_k, params.top_p, params.min_p, recorded
        return self._samplings.setdefault(key, len(self._samplings))

    def _add_segment(self, segment: Segment, max_pages: int) -> int:
        row = self._free_segments.pop() if self._free_segments else self._num_segments
        self._num_segments = max(self._num_segments, row + 1)
        if row >= len(self.pages):
            self.pages, self.max_pages, self.lengths, self.starts, self._serials = (
                _fit(array, row) for array in (self.pages, self.max_pages, self.lengths, self.starts, self._serials)
            )
        self.max_pages[row], self.starts[row], self._serials[row] = max_pages, segment.start, segment.serial
        self.lengths[row] = len(segment.tokens)
        self.pages = _fit(self.pages, len(segment.pages) - 1, axis=1)
        self.pages[row, : len(segment.pages)] = segment.pages
        return row


def _fit(array: NDArray[Any], index: int, axis: int = 0) -> NDArray[Any]:
    """The array, at least twice as long along an axis if it does not have this index."""
    length = array.shape[axis]
    if index < length:
        return array
    more = max(index + 1, 2 * length) - length
    return np.pad(array, [(0, more if each == axis else 0) for each in range(array.ndim)])
