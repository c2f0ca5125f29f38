"""The prefix cache: prompts with a common prefix share its keys and values.

| owns | does not own |
|---|---|
| nodes and their pages, locks, LRU eviction | which sequences run |

A node is a run of tokens that starts on a page of its own, so a child never shares a page with its parent and nothing is
copied when sequences diverge. Nodes are split where prompts diverge. If the split falls within a page, the keys and
values after it are moved, which is cheaper than recomputing them. If the common prefix is too short for a node, its pages
are copied instead.

A prompt is inserted before it is computed, so that prompts that arrive together share their prefixes too.

The first tokens of a prompt may belong to another model: an activated LoRA acts only on the end of a prompt, and the
tokens before that are computed by its base model. They are stored in the base's nodes, so the base reuses them and they
survive an update of the LoRA's weights. The rest of the prompt is stored in nodes below them.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from alignpro.engine.faults import is_out_of_memory
from alignpro.engine.pool import KVPool, Segment

MIN_NODE_TOKENS = 16
"""Minimum length of a common prefix to get a node: each level of nodes adds a pass of attention."""
MIN_COPIED_TOKENS = 4
"""Minimum length of a common prefix to have its pages copied; a shorter one is recomputed."""

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Node(Segment):
    """A run of tokens that follows its parent's tokens."""

    tokens: Tokens
    parent: Node | None = None
    children: dict[tuple[str, Tokens], Node] = field(default_factory=dict)
    """Keyed by model and first tokens: `MIN_NODE_TOKENS` of them, or all tokens of a shorter node."""
    sorted_keys: list[tuple[str, Tokens]] = field(default_factory=list)
    """The keys of `children`, sorted: neighbours have the longest common prefixes."""
    locks: int = 0
    """Number of running sequences whose path contains this node."""
    state: Tensor | None = None
    """(D,) the last hidden state at the end, if known."""

    @property
    def key(self) -> tuple[str, Tokens]:
        """Its key among its parent's children."""
        return self.model, self.tokens[:MIN_NODE_TOKENS]

    def path(self) -> list[Node]:
        """The nodes from the start of the prompt to this node, without the empty root."""
        nodes: list[Node] = []
        node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class PrefixTree:
    """The nodes of all models, by model name. A model's nodes are dropped when its weights change.

    Args:
        pool: Source of the pages. ``pool.num_free + num_cached + num_locked`` plus the pages of running sequences
            is ``pool.total``.
    """

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.num_cached = 0
        """Number of pages in unlocked nodes, all of which can be evicted."""
        self.num_locked = 0
        """Number of pages in nodes locked by a sequence."""
        self.serials = itertools.count()
        """Source of `Segment.serial` for every segment that has pages of the pool."""
        self.num_splits = 0
        """How often a node was split, which changes the paths below it."""
        self._roots: dict[str, Node] = {}
        self._root_models: dict[str, str] = {}  # model → the model whose root its nodes descend from
        self._idle: OrderedDict[Node, None] = OrderedDict()  # unlocked leaves, least recently used first

    def acquire(self, model: str, tokens: Tokens, base: str | None = None, shared: int = 0) -> Node | None:
        """Find or insert the node at which a prompt ends and lock its path. Returns None if there are not enough pages.

        If ``base`` is given, the first ``shared`` tokens belong to that model.
        """
        root = base or model
        self._root_models[model] = root
        if root not in self._roots:
            self._roots[root] = Node((), 0, next(self.serials), model=root)
        node: Node | None = self._roots[root]
        assert node is not None
        if base and shared:
            node = self._descend(node, base, tokens[:shared])
        return node and self._descend(node, model, tokens)

    def _descend(self, node: Node, model: str, tokens: Tokens) -> Node | None:
        """Extend a locked path to the end of a model's tokens. Without enough pages, unlock the path and return None."""
        while (at := node.start + len(node.tokens)) < len(tokens):
            try:
                below = self._next_node(node, model, tokens, at)
            except Exception:  # of the device
                self.release(node)
                raise
            if below is None:
                self.release(node)
                return None
            node = below
        return node

    def _next_node(self, node: Node, model: str, tokens: Tokens, at: int) -> Node | None:
        """Lock the child that continues with ``tokens[at:]``, creating it if needed; None if there is no memory for it."""
        child = _find_child(node, model, tokens, at)
        if child is None:
            return self._insert(node, model, tokens[at:])
        self._lock(child)
        common = _common_length(child.tokens, tokens, at)
        if common == len(child.tokens):
            return child
        try:
            return self._split(child, common)
        finally:
            self._unlock(child)

    def release(self, node: Node) -> None:
        """Unlock a path that `acquire` locked."""
        for each in reversed(node.path()):
            self._unlock(each)

    def allocate(self, model: str, count: int) -> list[int] | None:
        """Allocate ``count`` pages, evicting unlocked nodes as needed; None if even that is not enough."""
        while count <= self.pool.num_free + self.num_cached:
            while self.pool.num_free < count:
                self._evict(next(iter(self._idle)))
            if self.pool.reserve(count):
                return self.pool.allocate(model, count)
        return None  # also if the device is out of memory, as the pool has shrunk then

    def evict_all(self, keep: Collection[str] = ()) -> None:
        """Evict every unlocked node, except those of the models in ``keep``."""
        while nodes := [node for node in self._idle if node.model not in keep]:
            for node in nodes:
                self._evict(node)

    def drop(self, model: str) -> None:
        """Drop all nodes of a model, of which no sequence may be running."""
        roots = {model, self._root_models.get(model, model)}
        nodes = [node for root in roots for node in self.nodes(root) if model in (root, node.model)]
        for node in reversed(nodes):  # children first
            self._evict(node)

    def clear(self) -> None:
        """Forget all nodes, whatever state an interrupt left them in; the pool must be cleared too."""
        self._roots, self._root_models, self._idle = {}, {}, OrderedDict()
        self.num_cached = self.num_locked = 0

    def pages(self) -> list[list[int]]:
        """The page lists of all nodes."""
        return [node.pages for root in self._roots for node in self.nodes(root)]

    def nodes(self, model: str) -> Iterator[Node]:
        """All nodes of a model and the nodes of other models below them, parents first."""
        stack = list(self._roots[model].children.values()) if model in self._roots else []
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _insert(self, parent: Node, model: str, tokens: Tokens) -> Node | None:
        """Insert a new locked child, not yet computed; None if there are not enough pages."""
        pages = self.allocate(model, self.pool.pages_for(model, len(tokens)))
        if pages is None:
            return None
        try:
            computed = self._copy_common_prefix(parent, model, tokens, pages)
        except Exception as error:  # of the device
            self.pool.free(model, pages)
            if is_out_of_memory(error):
                return None
            raise
        start = parent.start + len(parent.tokens)
        node = Node(tokens, start, next(self.serials), pages, computed, model=model, parent=parent, locks=1)
        parent.children[node.key] = node
        insort(parent.sorted_keys, node.key)
        self.num_locked += len(pages)
        return node

    def _copy_common_prefix(self, parent: Node, model: str, tokens: Tokens, pages: Sequence[int]) -> int:
        """Copy the computed common prefix with a sibling into a new child's pages. Returns its number of tokens.

        The prefix is shorter than `MIN_NODE_TOKENS`; otherwise both would be below a common node. The rest of the last copied
        page holds the sibling's tokens until the child's own are computed.
        """
        place = bisect_left(parent.sorted_keys, (model, tokens[:MIN_NODE_TOKENS]))
        neighbours = parent.sorted_keys[max(0, place - 1) : place + 1]
        siblings = [parent.children[key] for key in neighbours if key[0] == model]
        common = [min(_common_length(sibling.tokens, tokens, 0), sibling.computed) for sibling in siblings]
        count = max(common, default=0)
        if count < MIN_COPIED_TOKENS:
            return 0
        held = self.pool.pages_for(model, count)
        self.pool.copy(siblings[common.index(count)].pages[:held], pages[:held])
        return count

    def _split(self, lower: Node, at: int) -> Node | None:
        """Split a locked node before its token ``at``. Returns the new, equally locked upper node; None without memory.

        ``lower`` remains the lower node, because sequences refer to a path by its last node.
        """
        pool, model = self.pool, lower.model
        above, below = pool.pages_for(model, at), pool.pages_for(model, len(lower.tokens) - at)
        extra = self.allocate(model, above + below - len(lower.pages))
        if extra is None:
            return None
        pages = lower.pages + extra
        if at < lower.computed and at % pool.page_size[model]:
            count = lower.computed - at
            try:
                pool.move(model, pool.slots(model, pages, at, count), pool.slots(model, pages[above:], 0, count))
            except Exception as error:
                pool.free(model, extra)
                if is_out_of_memory(error):
                    return None
                raise
        upper = Node(
            lower.tokens[:at],
            lower.start,
            next(self.serials),
            pages[:above],
            min(at, lower.computed),
            model=model,
            parent=lower.parent,
            children={(model, lower.tokens[at : at + MIN_NODE_TOKENS]): lower},
            sorted_keys=[(model, lower.tokens[at : at + MIN_NODE_TOKENS])],
            locks=lower.locks,
        )
        assert lower.parent is not None
        lower.parent.children[lower.key] = upper
        lower.tokens, lower.start, lower.parent = lower.tokens[at:], lower.start + at, upper
        lower.pages, lower.computed = pages[above:], max(0, lower.computed - at)
        self.num_locked += len(extra)
        self.num_splits += 1
        return upper

    def _lock(self, node: Node) -> None:
        if node.locks == 0:
            self._idle.pop(node, None)
            self.num_cached -= len(node.pages)
            self.num_locked += len(node.pages)
        node.locks += 1

    def _unlock(self, node: Node) -> None:
        node.locks -= 1
        if node.locks == 0:
            self.num_locked -= len(node.pages)
            self.num_cached += len(node.pages)
            if not node.children:
                self._idle[node] = None

    def _evict(self, node: Node) -> None:
        del self._idle[node]
        self.num_cached -= len(node.pages)
        self.pool.free(node.model, node.pages)
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        del parent.sorted_keys[bisect_left(parent.sorted_keys, node.key)]
        if parent.parent is not None and parent.locks == 0 and not parent.children:
            self._idle[parent] = None


def _find_child(node: Node, model: str, tokens: Tokens, at: int) -> Node | None:
    """The child that shares at least `MIN_NODE_TOKENS` tokens with ``tokens[at:]``, or all of its own if it has fewer."""
    if not node.children:
        return None
    longest = min(MIN_NODE_TOKENS, len(tokens) - at)
    found = (node.children.get((model, tokens[at : at + length])) for length in range(longest, 0, -1))
    return next((child for child in found if child is not None), None)


def _common_length(own: Tokens, tokens: Tokens, at: int) -> int:
    """The length of the common prefix of ``own`` and ``tokens[at:]``."""
    if tokens[at : at + len(own)] == own:
        return len(own)
    pairs = enumerate(zip(own, tokens[at:], strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(own), len(tokens) - at))
