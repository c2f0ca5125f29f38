"""Who runs in a tick: one model, the next token of each of its running sequences, and prompts as the budget allows.

Models that are one but for an adapter run as one, in one lane.

| owns | does not own |
|---|---|
| queues, admission, growth and preemption of sequences, the choice of a model | tensors, what is drawn |

When no page is to be had, unlocked nodes of the prefix tree go first, then the youngest running sequence: its pages are
freed and what it has drawn waits, to be computed again as one piece later on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from alignpro.engine.pool import KVPool, Segment
from alignpro.engine.prefix_tree import Node, PrefixTree
from alignpro.engine.sequence import SampledSequence

TAIL = 4
"""A stage with fewer than 1/TAIL of its places taken, and nobody waiting, shares its time with the next stage."""


@dataclass(frozen=True)
class Item:
    """Tokens ``first``.. ``first + count`` of the last segment of a path, to be computed."""

    path: tuple[Segment, ...]
    first: int
    count: int
    kind: str
    """``prefill``, ``decode`` or ``recompute``."""
    write: bool = True
    """False where keys and values are there already, and only the hidden state is wanted."""

    @property
    def segment(self) -> Segment:
        """What the tokens are part of."""
        return self.path[-1]

    @property
    def end(self) -> int:
        """Tokens of the segment that are there after the tick."""
        return self.first + self.count


@dataclass
class Tick:
    """The work of one forward pass, and the sequences that draw a token after it."""

    model: str
    """In whose forward pass."""
    items: list[Item] = field(default_factory=list)
    drawing: list[SampledSequence] = field(default_factory=list)


class Scheduler:
    """Runs sequences of several models on one pool.

    Args:
        pool: Pages.
        tree: Prompts; it may hold some from before.
        stages: Names of the lanes, in the order in which their sequences come about.
        max_batch: Sequences of a lane that run at once.
        token_budget: Tokens computed in a tick; running sequences' next tokens always are.
    """

    def __init__(
        self, pool: KVPool, tree: PrefixTree, stages: Sequence[str], *, max_batch: int, token_budget: int
    ) -> None:
        self.pool, self.tree, self.stages = pool, tree, stages
        self.max_batch, self.token_budget = max_batch, token_budget
        self.waiting: dict[str, deque[SampledSequence]] = {name: deque() for name in stages}
        self.running: list[SampledSequence] = []  # in the order in which they were admitted
        self.preemptions = 0
        self.hits = 0
        """Prompt tokens that were there when their sequence was admitted for the first time."""
        self._refused: list[SampledSequence] = []
        self._last = ""

    def add(self, sequence: SampledSequence) -> None:
        """Let a sequence wait for its turn."""
        self.waiting[sequence.lane].append(sequence)

    def next_tick(self) -> Tick | None:
        """What to compute next; None when all sequences have ended."""
        while order := self._order():
            for model in order:
                self._admit(model)
                self._grow(model)
                tick = self._work(model)
                if tick.items or tick.drawing:
                    self._last = model
                    return tick
                # None of its sequences could be admitted, or all had to be preempted.
        return None

    def take_refused(self) -> list[SampledSequence]:
        """Sequences that have failed since the last call, for want of memory that the pool was to have."""
        refused, self._refused = self._refused, []
        return refused

    def finish(self, sequence: SampledSequence) -> None:
        """Free what a sequence holds that has ended."""
        if sequence.own is not None:
            self.running.remove(sequence)
            self._release(sequence)

    def abort(self) -> None:
        """Free what all sequences hold."""
        while self.running:
            self._release(self.running.pop())

    def audit(self) -> None:
        """Check that every page is free, in the tree or a running sequence's, and in one place only.

        Raises:
            AssertionError: The books are wrong.
        """
        pool, tree = self.pool, self.tree
        nodes = [node for name in pool.page_size for node in tree.nodes(name)]
        own = sum(len(sequence.own.pages) for sequence in self.running if sequence.own)
        assert pool.free + tree.cached + tree.locked + own == pool.total
        assert tree.cached == sum(len(node.pages) for node in nodes if not node.locks)
        assert tree.locked == sum(len(node.pages) for node in nodes if node.locks)
        held = [page for node in nodes for page in node.pages]
        held += [page for sequence in self.running if sequence.own for page in sequence.own.pages]
        assert len(set(held)) == len(held) == sum(pool.used.values()) == pool.total - pool.free
        locks = [node for sequence in self.running if sequence.node for node in sequence.node.path()]
        assert len(locks) == sum(node.locks for node in nodes)

    def _order(self) -> list[str]:
        """Models that have work, the one to run first.

        A tick of a few sequences costs nearly what one of many does, and a model's weights are read in every tick of it.
        So the earliest stage goes first; while it is running out, it and the next take turns.
        """
        running = {name: sum(s.lane == name for s in self.running) for name in self.stages}
        busy = [name for name in self.stages if running[name] or self.waiting[name]]
        running_out = busy and not self.waiting[busy[0]] and running[busy[0]] * TAIL < self.max_batch
        return busy[::-1] if running_out and self._last == busy[0] else busy

    def _admit(self, model: str) -> None:
        """Let waiting sequences run while there are places, and pages for them and the next tokens of all others."""
        waiting = self.waiting[model]
        if any(sequence.needs_empty_pool for sequence in self.running):
            return
        places = self.max_batch - sum(s.lane == model for s in self.running)
        while waiting and places:
            sequence = waiting[0]
            if sequence.needs_empty_pool and not self.running:
                self.tree.evict_all()  # so that its prompt is one node, with no page half empty but the last
            if not self._start(sequence):
                if self.running:
                    return
                self.tree.evict_all()  # what is cached stands in the way of the only one that could run
                if not self._start(sequence):
                    waiting.popleft()
                    self._refuse(sequence)
                    continue
            waiting.popleft()
            places -= 1
            if sequence.needs_empty_pool:
                return

    def _start(self, sequence: SampledSequence) -> bool:
        """Lock its prompt and take pages for what it has drawn; False if there are too few."""
        model, drawn = sequence.model, sequence.drawn
        node = self.tree.acquire(model, sequence.prompt, sequence.base, sequence.shared)
        if node is None:
            return False
        try:
            pages = self.tree.allocate(model, self.pool.pages_for(model, len(drawn)))
        except Exception:  # of the device
            self.tree.release(node)
            raise
        if pages is None or (self.running and self.pool.free + self.tree.cached <= len(self.running)):
            if pages is not None:
                self.pool.give_back(model, pages)
            self.tree.release(node)
            return False
        if not sequence.preempted:
            self.hits += sum(each.computed for each in node.path())
        sequence.node = node
        sequence.own = Segment(drawn, len(sequence.prompt), next(self.tree.serials), pages, model=model)
        self.running.append(sequence)
        return True

    def _grow(self, lane: str) -> None:
        """A page for each sequence whose next token needs one; the oldest first, at the expense of the youngest."""
        for sequence in [s for s in self.running if s.lane == lane]:
            while sequence.own is not None:  # None: it was preempted for an older one
                own = sequence.own
                missing = self.pool.pages_for(own.model, len(own.tokens)) - len(own.pages)
                if missing == 0:
                    break
                pages = self.tree.allocate(own.model, missing)
                if pages is not None:
                    own.pages += pages
                    break
                youngest = self.running[-1]
                if youngest.needs_empty_pool and len(self.running) == 1:  # it has the pool to itself already
                    self.finish(youngest)
                    self._refuse(youngest)
                else:
                    self._preempt(youngest)

    def _refuse(self, sequence: SampledSequence) -> None:
        """Fail a sequence that the pool took when it was to have more memory than there turned out to be."""
        sequence.fail(f"the device has memory for only {self.pool.total} pages of the engine's pool: too few for it")
        self._refused.append(sequence)

    def _preempt(self, sequence: SampledSequence) -> None:
        sequence.needs_empty_pool = len(self.running) == 1
        self.running.remove(sequence)
        self._release(sequence)
        sequence.preempted = True
        self.waiting[sequence.lane].appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: SampledSequence) -> None:
        assert sequence.node is not None and sequence.own is not None
        self.tree.release(sequence.node)
        self.pool.give_back(sequence.model, sequence.own.pages)
        sequence.node = sequence.own = None

    def _work(self, model: str) -> Tick:
        """Next tokens first, then pieces of prompts and of what has to be computed again, up to the budget."""
        tick = Tick(model)
        ends: dict[Segment, int] = {}  # tokens of a segment that will be there after the tick
        mine = [sequence for sequence in self.running if sequence.lane == model]
        mine.sort(key=_pending)
        room = self.token_budget
        for sequence in mine:
            node, own = sequence.node, sequence.own
            assert node is not None and own is not None
            path = (*node.path(), own)
            # What has computed tokens behind it is all there.
            for depth, segment in enumerate(path[-1:] if own.computed else path, len(path) - 1 if own.computed else 0):
                if segment not in ends:
                    missing = len(segment.tokens) - segment.computed
                    count = missing if missing == 1 else min(missing, room)
                    if count:
                        kind = _kind(sequence, segment)
                        tick.items.append(Item(path[: depth + 1], segment.computed, count, kind))
                        room -= min(count, room)
                    ends[segment] = segment.computed + count
                if ends[segment] < len(segment.tokens):
                    break
            else:
                tick.drawing.append(sequence)
                if (
                    not own.tokens
                    and node.complete
                    and node.state is None
                    and node not in (i.segment for i in tick.items)
                ):
                    tick.items.append(Item(path[:-1], node.computed - 1, 1, "recompute", write=False))
        return tick


def _pending(sequence: SampledSequence) -> int:
    """Tokens to be computed before the sequence can draw."""
    assert sequence.node is not None and sequence.own is not None
    if sequence.own.computed:  # and so all before it
        return len(sequence.own.tokens) - sequence.own.computed
    path: list[Segment] = [*sequence.node.path(), sequence.own]
    return sum(len(segment.tokens) - segment.computed for segment in path)


def _kind(sequence: SampledSequence, segment: Segment) -> str:
    if isinstance(segment, Node):
        return "recompute" if sequence.preempted else "prefill"
    return "decode" if len(segment.tokens) - segment.computed == 1 else "recompute"
