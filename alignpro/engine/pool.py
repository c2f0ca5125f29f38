"""One arena of pages, shared by models of different KV geometry.

| owns | does not own |
|---|---|
| the arena, the list of free pages, each model's view of its layers | the contents of a page, who holds it |
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignpro.engine.arena import Arena, new_arena
from alignpro.engine.faults import is_out_of_memory
from alignpro_kernels import copy_pages, read_kv, write_kv

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Geometry:
    """The size of a model's KV cache per token."""

    layers: tuple[tuple[int, int], ...]
    """(kv_heads, head_dim) of each layer."""
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        return sum(2 * heads * width for heads, width in self.layers) * self.dtype.itemsize


@dataclass(eq=False)
class Segment:
    """Consecutive tokens of a sequence, whose keys and values fill pages of their own from the first slot on."""

    tokens: Sequence[int]
    """Token ids; −1 for the placeholders of a soft prompt."""
    start: int
    """Position of the first token."""
    serial: int
    """Unique within the pool; sorting by it gives the same order in every run."""
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    """Number of leading tokens whose keys and values are computed."""
    model: str = ""
    """Name of the model that the keys and values belong to."""

    @property
    def complete(self) -> bool:
        """Whether all its tokens are computed."""
        return self.computed == len(self.tokens)


class KVPool:
    """Pages of equal size in bytes. Each has one holder at a time: a node of the prefix tree or a running sequence.

    A page holds as many tokens of a model as fit in it: ``page_size[model]``.

    Memory is allocated as pages are first used. On the CPU the operating system does this lazily; on other devices the
    arena is doubled when it is full.

    Args:
        geometries: Model name → its KV geometry.
        device: Device of the pages.
        page_tokens: Page size in tokens of the largest model.
        total: Number of pages.
        arena: Makes the memory of the pages, from their size in bytes and the device.
    """

    def __init__(
        self,
        geometries: dict[str, Geometry],
        device: torch.device,
        *,
        page_tokens: int,
        total: int = 0,
        arena: Callable[[int, torch.device], Arena] = new_arena,
    ) -> None:
        self.geometries, self.device = geometries, device
        largest = max(geometry.token_bytes for geometry in geometries.values())
        self.page_bytes = -(-page_tokens * largest // 16) * 16  # whole elements of any dtype
        self.page_size = {name: self.page_bytes // geometry.token_bytes for name, geometry in geometries.items()}
        self.total = total
        """Number of pages. It may be raised, and is lowered if the device runs out of memory for them."""
        self.used: Counter[str] = Counter()
        """Model → number of pages it holds."""
        self._arena = arena(self.page_bytes, device)
        self._views: dict[str, list[Tensor]] = {}
        self._freed: list[int] = []
        self._first_unused = 0  # pages from here on were never used

    @property
    def num_free(self) -> int:
        """Number of pages that have no holder."""
        return self.total - self._first_unused + len(self._freed)

    @property
    def arena_bytes(self) -> int:
        """Size of the pages that have memory; on the CPU an upper limit of the memory in use."""
        return self._arena.backed * self.page_bytes

    @property
    def num_moves(self) -> int:
        """How often the pages have got another address, which makes the views of them useless."""
        return self._arena.num_moves

    def pages_for(self, model: str, tokens: int) -> int:
        """Number of pages needed for ``tokens`` tokens of a model."""
        return -(-tokens // self.page_size[model])

    def reserve(self, count: int) -> bool:
        """Make sure that ``count`` of the free pages are backed by memory.

        Returns False if the device does not have enough memory; `total` is then lowered to the pages that have memory.
        """
        needed = self._first_unused + count - min(count, len(self._freed))
        if needed <= self._arena.backed:
            return True
        sizes = [2 * needed, needed + needed // 2, needed + needed // 4, needed]
        if self.try_resize([self.total, *sizes] if self.device.type == "cpu" else sizes):
            return True
        backed = self._arena.backed
        logger.warning("%s has memory for %d of the %d pages of the pool", self.device, backed, self.total)
        self.total = backed
        return False

    def allocate(self, model: str, count: int) -> list[int]:
        """Take ``count`` free pages, which must be backed by memory (`reserve`).

        Raises:
            ValueError: Fewer pages are free.
        """
        if count > self.num_free:
            raise ValueError(f"{count} pages were requested, but only {self.num_free} are free")
        reused = min(count, len(self._freed))
        pages = [self._freed.pop() for _ in range(reused)]
        pages += range(self._first_unused, self._first_unused + count - reused)
        self._first_unused += count - reused
        self.used[model] += count
        return pages

    def free(self, model: str, pages: list[int]) -> None:
        """Free the pages in a list and clear the list."""
        self.used[model] -= len(pages)
        self._freed.extend(reversed(pages))
        pages.clear()

    def clear(self) -> None:
        """Take every page from its holder and forget all contents, whatever state an interrupt left; the memory stays."""
        self._freed, self._first_unused = [], 0
        self.used = Counter()
        self._views = {}

    def try_resize(self, counts: Sequence[int]) -> bool:
        """Get memory for the first of ``counts`` pages, capped at `total`, that the device has; False if it has none."""
        for count in counts:
            try:
                self._resize(min(self.total, count))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                return True
        return False

    def compact(self, keep: Sequence[list[int]]) -> int:
        """Free the arena's memory except for the given lists of pages, which are compacted; the lists are updated.

        Returns:
            The number of pages that had memory before.

        Raises:
            RuntimeError: Other pages are held.
        """
        before, old = self._arena.backed, [page for pages in keep for page in pages]
        if (others := self.total - self.num_free - len(old)) != 0:
            raise RuntimeError(f"{others} pages of the pool are in use: its memory cannot be freed now")
        if old:
            index = torch.tensor(old, dtype=torch.int64, device=self.device)
            # Copied as int64: uint8 elements would be copied byte by byte.
            words = self._arena.pages.view(torch.int64)
            words[: len(old)] = words.index_select(0, index)
        self._freed, self._first_unused = [], len(old)
        new = itertools.count()
        for pages in keep:
            pages[:] = [next(new) for _ in pages]
        self._resize(len(old))
        return before

    def layers(self, model: str) -> list[Tensor]:
        """The pages of each layer, (n_pages, 2, page_size, kv_heads, head_dim), as strided views of the arena."""
        if model not in self._views:
            geometry, size, at = self.geometries[model], self.page_size[model], 0
            elements = self._arena.pages.view(geometry.dtype)
            self._views[model] = []
            for heads, width in geometry.layers:
                count = 2 * size * heads * width
                self._views[model].append(elements[:, at : at + count].unflatten(1, (2, size, heads, width)))
                at += count
        return self._views[model]

    def slots(self, model: str, pages: Sequence[int], first: int, count: int) -> list[int]:
        """The slots of tokens first..first + count of a segment with these pages."""
        size = self.page_size[model]
        return [pages[j // size] * size + j % size for j in range(first, first + count)]

    def copy(self, source: Sequence[int], destination: Sequence[int]) -> None:
        """Copy whole pages of any model; no page may be both a source and a destination."""
        device = self.device
        copy_pages(self._arena.pages, torch.tensor(source, device=device), torch.tensor(destination, device=device))

    def move(self, model: str, source: Sequence[int], destination: Sequence[int]) -> None:
        """Copy the keys and values of some slots to others, which may overlap. If this raises, nothing was copied."""
        device = self.device
        come, go = torch.tensor(source, device=device), torch.tensor(destination, device=device)
        states = [read_kv(pages, come) for pages in self.layers(model)]
        for pages, (keys, values) in zip(self.layers(model), states, strict=True):
            write_kv(keys, values, pages, go)

    def _resize(self, count: int) -> None:
        pages = self._arena.pages
        self._arena.resize(count, self.total)
        if self._arena.pages is not pages:
            self._views = {}
