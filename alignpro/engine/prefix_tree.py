"""Prompts that begin alike share the keys and values of what they have in common.

| owns | does not own |
|---|---|
| nodes and their pages, locks, eviction of what was used longest ago | which sequences run |

A node is a run of tokens with its own pages from its first token on, so that a child never shares a page with its
parent: nothing is copied when sequences part ways. Nodes part where prompts do; a node that has to be split in the middle
of a page has the keys and values behind the split moved, which costs a copy and saves computing them again. Where prompts
have less in common than a node is worth, the pages of that are copied.

A prompt is put in before it is computed, so that prompts which arrive together share what they have in common too.

The first tokens of a prompt may be another model's: an activated LoRA acts on the end of a prompt, and what stands before
is its base model's. Then they lie among the base's nodes, where the base finds them too and new weights of the LoRA leave
them alone; the rest hangs below them.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from alignpro.engine.faults import out_of_memory
from alignpro.engine.pool import KVPool, Segment

SHORTEST = 16
"""Fewer common tokens are not worth a node: each level of nodes is one more pass of attention."""
COPIED = 4
"""Fewer common tokens than that are not worth a copy of their pages either, and are computed again."""

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Node(Segment):
    """A run of tokens after its parent's."""

    tokens: Tokens
    parent: Node | None = None
    children: dict[tuple[str, Tokens], Node] = field(default_factory=dict)
    """By model and first tokens: SHORTEST of them, or all of a node that has fewer."""
    order: list[tuple[str, Tokens]] = field(default_factory=list)
    """Their keys, sorted: neighbours have most in common."""
    locks: int = 0
    """Running sequences that go through it."""
    state: Tensor | None = None
    """(D,) the last hidden state at the end, if known."""

    @property
    def key(self) -> tuple[str, Tokens]:
        """Its place among its parent's children."""
        return self.model, self.tokens[:SHORTEST]

    def path(self) -> list[Node]:
        """From the first tokens of the prompt to this node; the empty root is left out."""
        nodes: list[Node] = []
        node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class PrefixTree:
    """Nodes of all models, by name; a model's are dropped when its weights change.

    Args:
        pool: Where pages come from. ``pool.free + cached + locked`` and what running sequences hold are all its pages.
    """

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.cached = 0
        """Pages of nodes that no sequence has locked: all can be evicted."""
        self.locked = 0
        """Pages of nodes that some sequence has locked."""
        self.serials = itertools.count()
        """For every segment that has pages of the pool, so that no two have the same."""
        self._roots: dict[str, Node] = {}
        self._hosts: dict[str, str] = {}  # model → the one below whose nodes its own hang
        self._idle: OrderedDict[Node, None] = OrderedDict()  # unlocked leaves, the one used longest ago first

    def acquire(self, model: str, tokens: Tokens, base: str | None = None, shared: int = 0) -> Node | None:
        """The node at which a prompt ends, put in if need be, with its path locked; None if there are no pages for it.

        The first ``shared`` tokens are those of the model ``base``, if that is given.
        """
        root = base or model
        self._hosts[model] = root
        node: Node | None = self._roots.setdefault(root, Node((), 0, next(self.serials), model=root))
        assert node is not None
        if base and shared:
            node = self._descend(node, base, tokens[:shared])
        return node and self._descend(node, model, tokens)

    def _descend(self, node: Node, model: str, tokens: Tokens) -> Node | None:
        """Go on from a locked path to where a model's tokens end; None, and nothing locked, if there are no pages."""
        while (at := node.start + len(node.tokens)) < len(tokens):
            try:
                below = self._step(node, model, tokens, at)
            except Exception:  # of the device
                self.release(node)
                raise
            if below is None:
                self.release(node)
                return None
            node = below
        return node

    def _step(self, node: Node, model: str, tokens: Tokens, at: int) -> Node | None:
        """Lock the child that a model's tokens at.. go on with, made if need be; None if there is no memory for it."""
        child = _child(node, model, tokens, at)
        if child is None:
            return self._insert(node, model, tokens[at:])
        self._lock(child)
        common = _common(child.tokens, tokens, at)
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
        """``count`` pages, unlocked nodes being evicted as needed; None if even that is not enough."""
        while count <= self.pool.free + self.cached:
            while self.pool.free < count:
                self._evict(next(iter(self._idle)))
            if self.pool.reserve(count):
                return self.pool.allocate(model, count)
        return None  # also where the device has no memory for more: the pool has become smaller then

    def evict_all(self, keep: Collection[str] = ()) -> None:
        """Evict every node that is not locked, but for those of models to be kept."""
        while nodes := [node for node in self._idle if node.model not in keep]:
            for node in nodes:
                self._evict(node)

    def drop(self, model: str) -> None:
        """Forget all nodes of a model.

        Raises:
            RuntimeError: A sequence of it is running.
        """
        roots = {model, self._hosts.get(model, model)}
        nodes = [node for root in roots for node in self.nodes(root) if model in (root, node.model)]
        if any(node.locks for node in nodes):
            raise RuntimeError(f"model {model}: its weights cannot change while it generates")
        for node in reversed(nodes):  # children first
            self._evict(node)

    def pages(self) -> list[list[int]]:
        """Those of every node."""
        return [node.pages for root in self._roots for node in self.nodes(root)]

    def nodes(self, model: str) -> Iterator[Node]:
        """All nodes of a model, and of others that hang below them, parents first."""
        stack = list(self._roots[model].children.values()) if model in self._roots else []
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _insert(self, parent: Node, model: str, tokens: Tokens) -> Node | None:
        """A new locked child, its pages not yet written; None if there are not enough."""
        pages = self.allocate(model, self.pool.pages_for(model, len(tokens)))
        if pages is None:
            return None
        try:
            computed = self._copy_beginning(parent, model, tokens, pages)
        except Exception:  # of the device
            self.pool.give_back(model, pages)
            raise
        start = parent.start + len(parent.tokens)
        node = Node(tokens, start, next(self.serials), pages, computed, model=model, parent=parent, locks=1)
        parent.children[node.key] = node
        insort(parent.order, node.key)
        self.locked += len(pages)
        return node

    def _copy_beginning(self, parent: Node, model: str, tokens: Tokens, pages: Sequence[int]) -> int:
        """Copy into a new child's pages what it has in common with a sibling and is computed; how many tokens that is.

        It is less than a node is worth, or the two would be below one. Behind it the last page has the sibling's tokens,
        until the child's own are computed.
        """
        place = bisect_left(parent.order, (model, tokens[:SHORTEST]))
        siblings = [parent.children[key] for key in parent.order[max(0, place - 1) : place + 1] if key[0] == model]
        common = [min(_common(sibling.tokens, tokens, 0), sibling.computed) for sibling in siblings]
        count = max(common, default=0)
        if count < COPIED:
            return 0
        held = self.pool.pages_for(model, count)
        self.pool.copy(siblings[common.index(count)].pages[:held], pages[:held])
        return count

    def _split(self, lower: Node, at: int) -> Node | None:
        """Part a locked node before its token ``at``: a new node above it, as locked, or None for want of memory.

        Sequences know a path by its last node, which stays the same one.
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
                pool.give_back(model, extra)
                if out_of_memory(error):
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
            children={(model, lower.tokens[at : at + SHORTEST]): lower},
            order=[(model, lower.tokens[at : at + SHORTEST])],
            locks=lower.locks,
        )
        assert lower.parent is not None
        lower.parent.children[lower.key] = upper
        lower.tokens, lower.start, lower.parent = lower.tokens[at:], lower.start + at, upper
        lower.pages, lower.computed = pages[above:], max(0, lower.computed - at)
        self.locked += len(extra)
        return upper

    def _lock(self, node: Node) -> None:
        if node.locks == 0:
            self._idle.pop(node, None)
            self.cached -= len(node.pages)
            self.locked += len(node.pages)
        node.locks += 1

    def _unlock(self, node: Node) -> None:
        node.locks -= 1
        if node.locks == 0:
            self.locked -= len(node.pages)
            self.cached += len(node.pages)
            if not node.children:
                self._idle[node] = None

    def _evict(self, node: Node) -> None:
        del self._idle[node]
        self.cached -= len(node.pages)
        self.pool.give_back(node.model, node.pages)
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        del parent.order[bisect_left(parent.order, node.key)]
        if parent.parent is not None and parent.locks == 0 and not parent.children:
            self._idle[parent] = None


def _child(node: Node, model: str, tokens: Tokens, at: int) -> Node | None:
    """The child that a model's tokens at.. go on with: for SHORTEST tokens at least, or for all that it has."""
    if not node.children:
        return None
    longest = min(SHORTEST, len(tokens) - at)
    found = (node.children.get((model, tokens[at : at + length])) for length in range(longest, 0, -1))
    return next((child for child in found if child is not None), None)


def _common(mine: Tokens, tokens: Tokens, at: int) -> int:
    """How many tokens at.. are a node's first ones."""
    if tokens[at : at + len(mine)] == mine:
        return len(mine)
    pairs = enumerate(zip(mine, tokens[at:], strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(mine), len(tokens) - at))
