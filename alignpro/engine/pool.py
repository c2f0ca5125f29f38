"""One arena of pages, from which models of different geometry draw memory for their keys and values.

| owns | does not own |
|---|---|
| the arena, the list of free pages, each model's view of its layers | what a page means, who holds it |
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignpro.engine.faults import out_of_memory
from alignpro_kernels import copy_pages, read_kv, write_kv

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Geometry:
    """What a model keeps of a token."""

    layers: tuple[tuple[int, int], ...]
    """(kv_heads, head_dim) of each layer."""
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return sum(2 * heads * width for heads, width in self.layers) * self.dtype.itemsize


@dataclass(eq=False)
class Segment:
    """Consecutive tokens of a sequence whose keys and values lie in pages of their own, from the first page's first slot."""

    tokens: Sequence[int]
    """Ids; −1 at the places of a soft prompt."""
    start: int
    """Position of the first token."""
    serial: int
    """Tells it from all others of its pool, and places them in an order that is the same in every run."""
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens, from the first, whose keys and values are there."""
    model: str = ""
    """Whose they are."""

    @property
    def complete(self) -> bool:
        """Whether all its tokens are computed."""
        return self.computed == len(self.tokens)


class KVPool:
    """Pages of one size in bytes. Each has one holder at a time, a node of the prefix tree or a running sequence.

    A page has as many tokens of a model as fit in it: ``page_size[model]``.

    The arena takes memory as pages are first used. On the CPU the system does that by itself; elsewhere the arena is
    doubled when it is full.

    Args:
        geometries: Model's name → what it keeps of a token.
        device: Where the arena lies.
        page_tokens: Tokens of the largest model in a page.
        total: Pages in all.
    """

    def __init__(
        self, geometries: dict[str, Geometry], device: torch.device, *, total: int = 0, page_tokens: int = 16
    ) -> None:
        self.geometries = geometries
        largest = max(geometry.token_bytes for geometry in geometries.values())
        self.page_bytes = -(-page_tokens * largest // 16) * 16  # whole elements of any dtype
        self.page_size = {name: self.page_bytes // geometry.token_bytes for name, geometry in geometries.items()}
        self.total = total
        """Pages in all; may be raised, and becomes less where the device has no memory for as many."""
        self.used: Counter[str] = Counter()
        """Model → pages that it holds."""
        self.generation = 0
        """Changes when the arena moves: views of it are out of date then."""
        self._arena = torch.empty(0, self.page_bytes, dtype=torch.uint8, device=device)
        self._views: dict[str, list[Tensor]] = {}
        self._returned: list[int] = []
        self._fresh = 0  # pages from here on were never used

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return self.total - self._fresh + len(self._returned)

    @property
    def arena_bytes(self) -> int:
        """Memory that the arena takes, or on the CPU may come to take."""
        return self._arena.numel()

    def pages_for(self, model: str, tokens: int) -> int:
        """How many pages hold that many tokens of a model."""
        return -(-tokens // self.page_size[model])

    def reserve(self, count: int) -> bool:
        """Have memory for ``count`` of the free pages.

        Where the device has not as much, there are no more pages from then on than it has memory for.
        """
        least = self._fresh + count - min(count, len(self._returned))
        if least <= len(self._arena):
            return True
        sizes = [2 * least, least]
        if self.try_take([self.total, *sizes] if self._arena.device.type == "cpu" else sizes):
            return True
        most = len(self._arena)
        logger.warning("%s has memory for %d of the %d pages of the pool", self._arena.device, most, self.total)
        self.total = most
        return False

    def allocate(self, model: str, count: int) -> list[int]:
        """Take ``count`` free pages, of which there must be as many, with memory for them (`reserve`)."""
        if count > self.free:
            raise ValueError(f"{count} pages are wanted and {self.free} are free")
        again = min(count, len(self._returned))
        pages = [self._returned.pop() for _ in range(again)]
        pages += range(self._fresh, self._fresh + count - again)
        self._fresh += count - again
        self.used[model] += count
        return pages

    def give_back(self, model: str, pages: list[int]) -> None:
        """Free the pages of a list, and empty it."""
        self.used[model] -= len(pages)
        self._returned.extend(reversed(pages))
        pages.clear()

    def take(self, count: int) -> None:
        """Have memory for the first ``count`` pages; what is in pages stays."""
        arena = torch.empty(count, self.page_bytes, dtype=torch.uint8, device=self._arena.device)
        arena[: len(self._arena)] = self._arena
        self._move_to(arena)

    def try_take(self, counts: Sequence[int]) -> bool:
        """`take` the first of some counts, each at most the total, that the device has memory for; False if for none."""
        for count in counts:
            try:
                self.take(min(self.total, count))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            else:
                return True
        return False

    def shrink(self, kept: Sequence[list[int]]) -> int:
        """Give the arena's memory back but for the pages in some lists, which move together; the lists follow.

        Returns:
            For how many pages it had memory.

        Raises:
            RuntimeError: Other pages are held.
        """
        before, old = len(self._arena), [page for pages in kept for page in pages]
        if (others := self.total - self.free - len(old)) != 0:
            raise RuntimeError(f"{others} pages of the pool are in use: it cannot be given back now")
        index = torch.tensor(old, dtype=torch.int64, device=self._arena.device)
        # As wide elements: bytes would be copied one by one.
        self._move_to(self._arena.view(torch.int64).index_select(0, index).view(torch.uint8))
        self._returned, self._fresh = [], len(old)
        new = itertools.count()
        for pages in kept:
            pages[:] = [next(new) for _ in pages]
        return before

    def layers(self, model: str) -> list[Tensor]:
        """Each layer's pages, (n_pages, 2, page_size, kv_heads, head_dim), strided views of the arena."""
        if model not in self._views:
            geometry, size, at = self.geometries[model], self.page_size[model], 0
            elements = self._arena.view(geometry.dtype)
            self._views[model] = []
            for heads, width in geometry.layers:
                count = 2 * size * heads * width
                self._views[model].append(elements[:, at : at + count].unflatten(1, (2, size, heads, width)))
                at += count
        return self._views[model]

    def slots(self, model: str, pages: Sequence[int], first: int, count: int) -> list[int]:
        """Where tokens first..first + count of a segment with these pages lie."""
        size = self.page_size[model]
        return [pages[j // size] * size + j % size for j in range(first, first + count)]

    def copy(self, source: Sequence[int], destination: Sequence[int]) -> None:
        """Copy whole pages, of whatever model, over others, of which none is a source."""
        device = self._arena.device
        copy_pages(self._arena, torch.tensor(source, device=device), torch.tensor(destination, device=device))

    def _move_to(self, arena: Tensor) -> None:
        self._arena, self._views = arena, {}
        self.generation += 1

    def move(self, model: str, source: Sequence[int], destination: Sequence[int]) -> None:
        """Copy the keys and values in some slots to others, which may overlap them: all of them, or if it raises none."""
        device = self._arena.device
        come, go = torch.tensor(source, device=device), torch.tensor(destination, device=device)
        states = [read_kv(pages, come) for pages in self.layers(model)]
        for pages, (keys, values) in zip(self.layers(model), states, strict=True):
            write_kv(keys, values, pages, go)
