"""Plan batches: one model, the next token of each of its running sequences, and as much prefill as the budget allows.

Models that differ only in an adapter run together, in the forward passes of one of them.

| owns | does not own |
|---|---|
| queues, admission, growth and preemption of sequences, the choice of a model | tensors, the sampled tokens |

When pages run out, unlocked nodes of the prefix tree are evicted first. After that, the youngest running sequence is
preempted: its pages are freed, and the tokens it has drawn are recomputed in one piece when it resumes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import inf

import numpy as np

from alignpro.engine.pool import KVPool, Segment
from alignpro.engine.prefix_tree import Node, PrefixTree
from alignpro.engine.sequence import SampledSequence
from alignpro.engine.sequence_arrays import Ints
from alignpro.engine.sequence_table import SequenceTable

TAIL_FRACTION = 1 / 4
"""A model with no waiting sequences and fewer than ``TAIL_FRACTION * max_batch`` running alternates with the next one."""
NO_ROWS: Ints = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Chunk:
    """Tokens ``first``..``first + count`` of the last segment of a path, to be computed."""

    path: tuple[Segment, ...]
    first: int
    count: int
    kind: str
    """``prefill``, ``decode`` or ``recompute``."""
    write: bool = True
    """False if the keys and values are already computed and only the hidden state is needed."""

    @property
    def segment(self) -> Segment:
        """The segment that the tokens belong to."""
        return self.path[-1]

    @property
    def end(self) -> int:
        """Number of computed tokens of the segment after the batch."""
        return self.first + self.count


@dataclass
class Batch:
    """The work of one forward pass, and the sequences that draw a token after it."""

    model: str
    """Name of the model whose forward pass is run."""
    decoding: Ints
    """Rows of the sequences that compute their last token; each of them draws."""
    chunks: list[Chunk] = field(default_factory=list)
    """Everything else to compute."""
    drawing: list[SampledSequence] = field(default_factory=list)
    """Sequences that draw after chunks, or at the end of prompts that are computed already."""

    @property
    def to_sample(self) -> Ints:
        """The rows of all sequences that draw, (B,)."""
        return np.concatenate([self.decoding, rows_of(self.drawing)]) if self.drawing else self.decoding

    @property
    def num_tokens(self) -> int:
        """Number of tokens to compute."""
        return len(self.decoding) + sum(chunk.count for chunk in self.chunks)

    def in_chunks(self, table: SequenceTable) -> Batch:
        """The same work, all of it as chunks."""
        table.read_newest(self.decoding)  # a pass without graphs reads them in every step
        decoding = table.sequences(self.decoding)
        chunks = [*map(_last_token, decoding), *self.chunks]
        return Batch(self.model, rows_of([]), chunks, decoding + self.drawing)


class _Stage:
    """The sequences of a model that have not ended."""

    def __init__(self) -> None:
        self.waiting: deque[SampledSequence] = deque()
        self.running: dict[SampledSequence, None] = {}  # in the order in which they were admitted
        self.decoding = rows_of([])
        """Rows of those that compute their last token in each batch, most of them in order; a new array at each change."""
        self.starting: dict[SampledSequence, None] = {}  # the others
        self._arrivals: Counter[int] = Counter()  # of the sequences that run

    @property
    def earliest(self) -> float:
        """The earliest arrival; infinite if there are no sequences."""
        return min(*self._arrivals, self.waiting[0].request.arrival if self.waiting else inf, inf)

    def start(self, sequence: SampledSequence) -> None:
        """Note that a sequence runs."""
        self.running[sequence] = self.starting[sequence] = None
        self._arrivals[sequence.request.arrival] += 1

    def stop(self, sequence: SampledSequence) -> None:
        """Note that a running sequence does not run any more."""
        del self.running[sequence]
        if sequence in self.starting:
            del self.starting[sequence]
        else:
            self.decoding = self.decoding[self.decoding != sequence.row]
        self._arrivals[sequence.request.arrival] -= 1
        if not self._arrivals[sequence.request.arrival]:
            del self._arrivals[sequence.request.arrival]

    def find_decoding(self) -> None:
        """Move the sequences that have begun to decode. They go on until they stop: whatever fails ends them."""
        begun = [sequence for sequence in self.starting if _decodes(sequence)]
        if begun:
            self.begin_decoding(begun)

    def begin_decoding(self, sequences: Sequence[SampledSequence]) -> None:
        """Move sequences that have begun to decode, or have drawn the token with which they do."""
        self.decoding = np.concatenate([self.decoding, rows_of(sequences)])
        for sequence in sequences:
            del self.starting[sequence]


class Scheduler:
    """Schedules the sequences of several models on one pool.

    Args:
        pool: Source of the pages.
        tree: The prefix cache.
        models: Names of the models whose forward passes are run, in the order in which chains pass through them.
        max_batch: Maximum number of sequences in a model's batch.
        token_budget: Tokens per batch. The next token of every running sequence is computed even beyond it.
    """

    def __init__(
        self, pool: KVPool, tree: PrefixTree, models: Sequence[str], *, max_batch: int, token_budget: int
    ) -> None:
        self.pool, self.tree, self.models = pool, tree, models
        self.max_batch, self.token_budget = max_batch, token_budget
        self.table = SequenceTable(pool, tree)
        self.running: dict[SampledSequence, None] = {}  # in the order in which they were admitted
        self._stages = {name: _Stage() for name in self.models}
        self._alone: set[SampledSequence] = set()  # running ones beside which none is admitted
        self._failed: list[SampledSequence] = []
        self._last = ""

    @property
    def pending(self) -> list[SampledSequence]:
        """All sequences that have not ended."""
        return [*self.running, *chain.from_iterable(stage.waiting for stage in self._stages.values())]

    @property
    def idle(self) -> bool:
        """Whether all sequences have ended."""
        return not any(stage.running or stage.waiting for stage in self._stages.values())

    @property
    def oldest(self) -> float:
        """The earliest arrival of a sequence that has not ended."""
        return min(stage.earliest for stage in self._stages.values())

    def add(self, sequence: SampledSequence) -> None:
        """Append a sequence to the queue of its model."""
        self._stages[sequence.forward_model].waiting.append(sequence)

    def schedule(self) -> Batch | None:
        """The next batch to compute; None when all sequences have ended, some of which may have failed (`take_failed`)."""
        while order := self._order():
            for model in order:
                self._admit(model)
                self._grow(model)
                batch = self._build_batch(model)
                if batch.chunks or batch.drawing or len(batch.decoding):
                    self._last = model
                    return batch
                # None of its sequences could be admitted, or all had to be preempted.
        return None

    def schedule_ahead(self, batch: Batch, ending: Ints, apart: Collection[str]) -> Batch | None:
        """The batch after one whose tokens have been drawn but are not known; None if it depends on them.

        It does not, whichever sequences end, if all that decode have pages without a preemption. The table must count the
        tokens that are not known.

        Args:
            batch: The batch, all of whose sequences have drawn.
            ending: The rows of those that have drawn their last token.
            apart: The models that compute chunks apart from the sequences that decode. In a pass of both, all tokens
                must be known.
        """
        if batch.drawing:
            self._stages[batch.model].begin_decoding(batch.drawing)
        model = self._order()[0]
        self._admit(model)
        if not self._grow_at_once(model):
            return None
        following = self._build_batch(model, ending)
        decodes, starts = len(following.decoding) > 0, bool(following.chunks or following.drawing)
        if not (decodes or starts) or (decodes and starts and model not in apart):
            return None
        self._last = model
        return following

    def decoding(self, model: str) -> Ints:
        """The rows of a model's sequences that decode: another array as soon as one of them stops."""
        return self._stages[model].decoding

    def take_failed(self) -> list[SampledSequence]:
        """Return the sequences that have failed since the last call because the pool got less memory than planned."""
        failed, self._failed = self._failed, []
        return failed

    def remove(self, sequence: SampledSequence) -> None:
        """Free the pages and locks of a sequence that has ended or is cancelled, or take it out of its queue."""
        if sequence.output is not None:
            self._stop(sequence)
        elif sequence.completion is None:
            self._stages[sequence.forward_model].waiting.remove(sequence)

    def clear(self) -> None:
        """Forget all sequences, whatever state an interrupt left; pool and tree must be cleared too."""
        self._stages = {name: _Stage() for name in self.models}
        self.running, self._alone, self._failed, self._last = {}, set(), [], ""
        self.table.clear()

    def audit(self) -> None:
        """Check that every page is in exactly one place: free, in the tree, or held by a running sequence.

        Raises:
            AssertionError: The bookkeeping is inconsistent.
        """
        pool, tree = self.pool, self.tree
        nodes = [node for name in pool.page_size for node in tree.nodes(name)]
        own = sum(len(sequence.output.pages) for sequence in self.running if sequence.output)
        assert pool.num_free + tree.num_cached + tree.num_locked + own == pool.total
        assert tree.num_cached == sum(len(node.pages) for node in nodes if not node.locks)
        assert tree.num_locked == sum(len(node.pages) for node in nodes if node.locks)
        held = [page for node in nodes for page in node.pages]
        held += [page for sequence in self.running if sequence.output for page in sequence.output.pages]
        assert len(set(held)) == len(held) == sum(pool.used.values()) == pool.total - pool.num_free
        locks = [node for sequence in self.running if sequence.node for node in sequence.node.path()]
        assert len(locks) == sum(node.locks for node in nodes)
        for stage in self._stages.values():
            assert stage.running.keys() == {*stage.starting, *self.table.sequences(stage.decoding)}
        self.table.audit()

    def _order(self) -> list[str]:
        """Models that have work, the one to run first at the front.

        A batch of few sequences costs nearly as much as one of many, because each batch reads all of the model's weights.
        So the first stage of a chain goes first; when it runs low, it and the next stage take turns. The model of the
        sequence that arrived first precedes all others, so that none waits forever while new ones keep arriving.
        """
        busy = [name for name, stage in self._stages.items() if stage.running or stage.waiting]
        busy.sort(key=lambda name: self._stages[name].earliest)
        if busy and self._last == busy[0]:
            first = self._stages[busy[0]]
            if not first.waiting and len(first.running) < TAIL_FRACTION * self.max_batch:
                return busy[::-1]
        return busy

    def _admit(self, model: str) -> None:
        """Admit waiting sequences while the batch has room and there are pages for them and for growth of the others."""
        waiting, places = self._stages[model].waiting, self.max_batch - len(self._stages[model].running)
        if not waiting or self._alone:
            return
        while waiting and places:
            sequence = waiting[0]
            if sequence.needs_empty_pool and not self.running:
                self.tree.evict_all()  # so that its prompt is a single node, of which only the last page is partly filled
            if not self._start(sequence):
                if self.running:
                    return
                self.tree.evict_all()  # cached prompts keep the only sequence that could run from starting
                if not self._start(sequence):
                    waiting.popleft()
                    self._fail(sequence)
                    continue
            waiting.popleft()
            places -= 1
            if sequence.needs_empty_pool:
                return

    def _start(self, sequence: SampledSequence) -> bool:
        """Lock a sequence's prompt and allocate pages for its drawn tokens; False if there are too few pages."""
        request, model = sequence.request, sequence.model
        node = self.tree.acquire(model, request.prompt, request.base, request.num_base_tokens)
        if node is None:
            return False
        try:
            pages = self.tree.allocate(model, self.pool.pages_for(model, len(sequence.output_ids)))
        except Exception:  # raised by the device
            self.tree.release(node)
            raise
        if pages is None or (self.running and self.pool.num_free + self.tree.num_cached <= len(self.running)):
            if pages is not None:
                self.pool.free(model, pages)
            self.tree.release(node)
            return False
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sum(each.computed for each in node.path())
        sequence.node = node
        start, serial = len(request.prompt), next(self.tree.serials)
        sequence.output = Segment(sequence.output_ids, start, serial, pages, model=model)
        self.table.add(sequence)
        self.running[sequence] = None
        if sequence.needs_empty_pool:
            self._alone.add(sequence)
        self._stages[sequence.forward_model].start(sequence)
        return True

    def _grow_at_once(self, model: str) -> bool:
        """Allocate a page for each sequence whose next token needs one; False, and nothing is done, if that is not simple."""
        rows, same_model = self.table.without_room(model)
        growing = self.table.sequences(rows)
        if not growing:
            return True
        pages = self.tree.allocate(growing[0].model, len(growing)) if same_model else None
        if pages is not None:
            self.table.add_pages(growing, rows, pages)
        return pages is not None

    def _grow(self, model: str) -> None:
        """Allocate a page for each sequence whose next token needs one, oldest first, preempting the youngest if needed."""
        if self._grow_at_once(model):  # as in most batches
            return
        growing = self.table.sequences(self.table.without_room(model)[0])
        for sequence in growing:
            while sequence.output is not None:  # None if it was preempted in favour of an older one
                pages = self.tree.allocate(sequence.model, 1)
                if pages is not None:
                    self.table.add_pages([sequence], rows_of([sequence]), pages)
                    break
                youngest = next(reversed(self.running))
                if youngest.needs_empty_pool and len(self.running) == 1:  # it has the pool to itself already
                    self.remove(youngest)
                    self._fail(youngest)
                else:
                    self._preempt(youngest)

    def _fail(self, sequence: SampledSequence) -> None:
        """Fail a sequence that no longer fits because the pool got less memory than planned."""
        sequence.fail(
            f"the device has memory for only {self.pool.total} pages of the engine's pool: too few for this sequence"
        )
        self._failed.append(sequence)

    def _preempt(self, sequence: SampledSequence) -> None:
        sequence.needs_empty_pool = len(self.running) == 1
        self._stop(sequence)
        sequence.num_preemptions += 1
        self._stages[sequence.forward_model].waiting.appendleft(sequence)

    def _stop(self, sequence: SampledSequence) -> None:
        assert sequence.node is not None and sequence.output is not None
        del self.running[sequence]
        self._alone.discard(sequence)
        self._stages[sequence.forward_model].stop(sequence)
        self.table.remove(sequence)
        self.tree.release(sequence.node)
        self.pool.free(sequence.model, sequence.output.pages)
        sequence.node = sequence.output = None

    def _build_batch(self, model: str, ending: Ints = NO_ROWS) -> Batch:
        """Build a model's batch: next tokens first, then chunks of prefill and recomputation up to the token budget.

        ``ending`` are the rows of sequences that have drawn their last token.
        """
        stage = self._stages[model]
        stage.find_decoding()
        rows = stage.decoding[~np.isin(stage.decoding, ending)] if len(ending) else stage.decoding
        if len(rows):
            in_order = self.table.gather(rows).rows
            if len(in_order) == len(stage.decoding):
                stage.decoding = in_order  # which the next step keeps
            rows = in_order
        batch = Batch(model, rows)
        ends: dict[Segment, int] = {}  # segment → its number of computed tokens after the batch
        budget = self.token_budget - len(batch.decoding)
        for sequence in sorted(stage.starting, key=_num_pending_tokens):
            node, own = sequence.node, sequence.output
            assert node is not None and own is not None
            path = (*node.path(), own)
            # If the last segment has computed tokens, everything before it is complete.
            for depth, segment in enumerate(path[-1:] if own.computed else path, len(path) - 1 if own.computed else 0):
                if segment not in ends:
                    missing = len(segment.tokens) - segment.computed
                    count = missing if missing == 1 else min(missing, max(0, budget))
                    if count:
                        kind = _kind(sequence, segment)
                        batch.chunks.append(Chunk(path[: depth + 1], segment.computed, count, kind))
                        budget -= count
                    ends[segment] = segment.computed + count
                if ends[segment] < len(segment.tokens):
                    break
            else:
                batch.drawing.append(sequence)
                if (
                    not own.tokens
                    and node.complete
                    and node.state is None
                    and node not in (i.segment for i in batch.chunks)
                ):
                    batch.chunks.append(Chunk(path[:-1], node.computed - 1, 1, "recompute", write=False))
        return batch


def rows_of(sequences: Sequence[SampledSequence]) -> Ints:
    """The rows of N running sequences, (N,)."""
    return np.array([sequence.row for sequence in sequences], np.int64)


def _decodes(sequence: SampledSequence) -> bool:
    """Whether only the last token of a sequence remains to be computed."""
    node, own = sequence.node, sequence.output
    assert node is not None and own is not None
    missing = len(sequence.output_ids) - own.computed
    return missing == 1 and (own.computed > 0 or all(each.complete for each in node.path()))


def _last_token(sequence: SampledSequence) -> Chunk:
    node, own = sequence.node, sequence.output
    assert node is not None and own is not None
    return Chunk((*node.path(), own), len(sequence.output_ids) - 1, 1, "decode")


def _num_pending_tokens(sequence: SampledSequence) -> int:
    """Number of tokens to compute before the sequence can draw."""
    assert sequence.node is not None and sequence.output is not None
    if sequence.output.computed:  # then everything before it is complete
        return len(sequence.output.tokens) - sequence.output.computed
    path: list[Segment] = [*sequence.node.path(), sequence.output]
    return sum(len(segment.tokens) - segment.computed for segment in path)


def _kind(sequence: SampledSequence, segment: Segment) -> str:
    if isinstance(segment, Node):
        return "recompute" if sequence.num_preemptions else "prefill"
    return "decode" if len(segment.tokens) - segment.computed == 1 else "recompute"
