"""Decode batches in a few fixed shapes, each captured once as a CUDA graph and replayed.

A decode batch consists of hundreds of small kernels, which a GPU runs faster than Python can launch them. A CUDA graph
needs a single launch, but fixes all addresses and grid sizes. So a batch in which every chunk is one token is padded to
one of a few `Shape`s, and the inputs of each batch are copied into static buffers.

| owns | does not own |
|---|---|
| shapes, their buffers, the captured graphs | attention (`paged_attention.PagedAttention`), the head and sampling |

A padding row attends to no key (its position is −1), and its own key is not written (slot −1). The head is not captured:
there is one pass for each set of sampling parameters, these sets differ between batches, and the few kernels involved are
autotuned on first use.

A graph holds the addresses of its buffers, the arena and the weights. It is dropped when the arena moves
(`KVPool.generation`), or when weights move or adapters are switched (`LanguageModel.graph_key`).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from alignpro.engine.pool import KVPool
from alignpro.engine.scheduler import Chunk
from alignpro.engine.stats import EngineStats
from alignpro.errors import ModelError
from alignpro.models.language_model import LanguageModel
from alignpro.models.paged_attention import PagedAttention
from alignpro_kernels import PagedKeys

logger = logging.getLogger(__name__)

MAX_GRAPHS = 64
"""Maximum number of graphs kept, least recently used dropped first. Each holds an output and some MB of driver memory."""
ALL_ROWS = -1
"""Value of `Shape.active` if a token LoRA acts on all tokens."""


class Shape(NamedTuple):
    """The sizes of a batch that a graph fixes."""

    rows: int
    """T: the number of tokens, including padding."""
    levels: tuple[tuple[int, int], ...]
    """For each depth, the number of segments S and the maximum number of pages per segment, including padding."""
    active: int
    """Number of tokens that a token LoRA acts on, including padding; `ALL_ROWS` for all of them."""

    @classmethod
    def for_batch(cls, tokens: int, levels: Sequence[tuple[int, int]], active: int) -> Shape:
        """The smallest shape for ``tokens`` tokens, where the adapter acts on ``active`` of them or on `ALL_ROWS`."""
        some = active > 0
        rows = padded(tokens + some)  # an adapter that acts on some tokens needs a padding row to act on as well
        sizes = tuple((min(rows, power_of_two(s)), power_of_two(pages)) for s, pages in levels)
        return cls(rows, sizes, padded(active) if some else active)

    @property
    def sizes(self) -> list[int]:
        """Buffer sizes in int32 elements: ids, positions, slots, active rows (all int64), then five per level."""
        first = [2 * self.rows] * 3 + [2 * max(0, self.active)]
        return first + [n for s, pages in self.levels for n in (self.rows, s + 1, s * pages, s, s)]

    @property
    def spaces(self) -> list[int]:
        """`sizes` rounded up to 16 bytes each: kernels are recompiled for buffers of a different alignment."""
        return [-(-size // 4) * 4 for size in self.sizes]


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()


def padded(count: int) -> int:
    """Round up to 1, 2, 4, 8, then multiples of 8 to 128, of 16 to 256, of 32 to 512, and so on.

    Above 64, at most an eighth is added.
    """
    step = max(8, power_of_two(count) // 16)
    return power_of_two(count) if count <= 8 else -(-count // step) * step


class _Buffers(NamedTuple):
    ids: Tensor
    """(T,) int64; 0 for padding."""
    positions: Tensor
    """(T,) int64; 0 for padding."""
    slots: Tensor
    """(T,) int64."""
    active: Tensor
    """(A,) int64: rows that a token LoRA acts on; padded with the last row, which is itself padding."""
    levels: list[PagedKeys]

    @classmethod
    def within(cls, memory: Tensor, shape: Shape) -> _Buffers:
        """Views of a single int32 buffer, so that one copy fills them all."""
        spaces = memory.split(shape.spaces)
        ids, positions, slots, active, *rest = (x[:size] for x, size in zip(spaces, shape.sizes, strict=True))
        levels = []
        for i, (s, pages) in enumerate(shape.levels):
            seen_from, bounds, table, lengths, starts = rest[5 * i : 5 * i + 5]
            levels.append(PagedKeys(bounds, table.view(s, pages), lengths, seen_from, starts))
        ids, positions, slots, active = (x.view(torch.int64) for x in (ids, positions, slots, active))
        return cls(ids, positions, slots, active, levels)


class StaticPlan(PagedAttention):
    """The attention metadata of a batch in static buffers, and the graph that reads them."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        self.memory = torch.zeros(sum(shape.spaces), dtype=torch.int32, device=device)
        self.ids, self.positions, slots, active, levels = _Buffers.within(self.memory, shape)
        self.active = active if shape.active > 0 else shape.active == ALL_ROWS
        super().__init__((), slots, levels)
        self.last_row: dict[int, int] = {}
        """``id`` of a segment → the row of its token."""
        self.runs = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.states: Tensor | None = None
        """(T, D): the buffer into which the graph writes the last hidden states."""

    def fill(
        self, pool: KVPool, model: str, chunks: Sequence[Chunk], depths: Sequence[_Depth], active: Sequence[int]
    ) -> None:
        """Copy a batch that fits into the buffers.

        Args:
            pool: Holds the keys and values.
            model: Name of the model that runs.
            chunks: Chunks of one token each, in depth-first order of the prefix tree.
            depths: The segments at each depth of the chunks' paths.
            active: The rows that a token LoRA acts on; empty if it acts on all or on none.
        """
        # Allocated anew for each batch: the host may run ahead of the asynchronous copy. The caching allocator of pinned
        # memory does not reuse a block before its copy is done.
        memory = torch.zeros(len(self.memory), dtype=torch.int32, pin_memory=self.memory.is_cuda)
        buffers = _Buffers.within(memory, self.shape)
        count, page_size = len(chunks), pool.page_size[model]
        own = [(chunk.path[-1], chunk.first, chunk.write) for chunk in chunks]
        positions = np.array([segment.start + first for segment, first, _ in own])
        buffers.ids.numpy()[:count] = [segment.tokens[first] for segment, first, _ in own]
        buffers.positions.numpy()[:count] = positions
        buffers.slots.fill_(-1)
        buffers.slots.numpy()[:count] = [
            segment.pages[first // page_size] * page_size + first % page_size if write else -1
            for segment, first, write in own
        ]
        buffers.active.fill_(self.shape.rows - 1)
        buffers.active.numpy()[: len(active)] = active
        for level, depth in zip(buffers.levels, depths, strict=True):
            segments = len(depth.begins)
            level.query_positions.fill_(-1)
            level.query_positions.numpy()[:count] = np.where(depth.reached, positions, -1)
            # A row without a segment at this level is counted with the preceding segment: at query position −1 it attends
            # to none of that segment's keys.
            level.cu_queries.fill_(self.shape.rows)
            level.cu_queries.numpy()[:segments] = depth.begins
            level.key_lengths.numpy()[:segments] = depth.lengths
            level.key_starts.numpy()[:segments] = depth.starts
            table = level.page_table.numpy()[:segments]
            held = np.array([len(pages) for pages in depth.pages])
            table[np.arange(table.shape[1]) < held[:, None]] = list(chain.from_iterable(depth.pages))
        self.memory.copy_(memory, non_blocking=True)
        self.last_row = {id(segment): row for row, (segment, *_) in enumerate(own)}


class _Depth(NamedTuple):
    """The segments at one depth of N chunks' paths, in order."""

    reached: list[bool]
    """(N,) whether a chunk's path reaches this depth."""
    begins: list[int]
    """The first row of each segment."""
    pages: list[list[int]]
    lengths: list[int]
    starts: list[int]


def _depths(chunks: Sequence[Chunk]) -> list[_Depth]:
    ends = {chunk.segment: chunk.end for chunk in chunks}
    depths = []
    for d in range(max(len(chunk.path) for chunk in chunks)):
        there = [chunk.path[d] if len(chunk.path) > d else None for chunk in chunks]
        rows = [row for row, (one, other) in enumerate(zip([None, *there], there, strict=False)) if one is not other]
        begun = [(row, segment) for row in rows if (segment := there[row]) is not None]
        begins, segments = [row for row, _ in begun], [segment for _, segment in begun]
        depth = _Depth(
            [segment is not None for segment in there],
            begins,
            [segment.pages for segment in segments],
            [ends.get(segment, segment.computed) for segment in segments],
            [segment.start for segment in segments],
        )
        if begins[0] > 0:  # the first rows have no segment at this depth: give them one without keys
            depth = _Depth(depth.reached, [0, *begins], [[], *depth.pages], [0, *depth.lengths], [0, *depth.starts])
        depths.append(depth)
    return depths


class DecodeGraphs:
    """The static plans and graphs of decode batches on one device, by model and shape.

    The first batch of a shape runs eagerly, which compiles and loads the kernels it needs; the second is captured.

    Args:
        pool: Holds the keys and values.
        device: Device of the pool.
        capture: False to pad batches but run them eagerly, on any device; graphs are compared with this.
        required: Whether a model that cannot be captured is an error. If not, a warning is logged once and the model runs
            without graphs.
    """

    def __init__(self, pool: KVPool, device: torch.device, *, capture: bool = True, required: bool = False) -> None:
        self.pool, self.device, self.capture, self.required = pool, device, capture, required
        self._plans: OrderedDict[tuple[str, Shape], StaticPlan] = OrderedDict()  # least recently used first
        self._graph_keys: dict[str, tuple[object, ...]] = {}
        self._generation = pool.generation
        self._refused: set[str] = set()
        self._memory: Any = None  # handle of the memory pool that all graphs share: only one of them runs at a time
        self._stream: torch.cuda.Stream | None = None
        self._failed: list[torch.cuda.CUDAGraph] = []

    def prepare(self, name: str, model: LanguageModel) -> None:
        """Prepare for a run of a model: drop its graphs if its weights have moved or its adapters were switched.

        Raises:
            ModelError: Graphs are required, but the model cannot be captured.
        """
        if self._graph_keys.get(name) != (graph_key := model.graph_key):
            for key in [key for key in self._plans if key[0] == name]:
                del self._plans[key]
            self._graph_keys[name] = graph_key
        if self.capture and name not in self._refused and (reason := _unsuited(model)) is not None:
            self._refuse(name, model, reason, None)

    def clear(self) -> None:
        """Drop all graphs and free their memory."""
        self._plans.clear()
        self._memory = None

    def plan(self, name: str, model: LanguageModel, chunks: Sequence[Chunk]) -> StaticPlan | None:
        """The plan of a batch, valid until the next one; None if it is not a decode batch or the model is not captured."""
        if name in self._refused or any(chunk.count != 1 or chunk.path[-1].tokens[chunk.first] < 0 for chunk in chunks):
            return None  # a negative token is a placeholder of a soft prompt
        if self._generation != self.pool.generation:
            self.clear()
            self._generation = self.pool.generation
        chunks = sorted(chunks, key=lambda chunk: [segment.serial for segment in chunk.path])
        depths = _depths(chunks)
        active = (
            [row for row, chunk in enumerate(chunks) if chunk.path[-1].model == name] if model.has_token_lora else []
        )
        whole = not model.has_token_lora or len(active) == len(chunks)
        levels = [(len(d.begins), max(map(len, d.pages))) for d in depths]
        shape = Shape.for_batch(len(chunks), levels, ALL_ROWS if whole else len(active))
        plan = self._plans.pop((name, shape), None) or StaticPlan(shape, self.device)
        self._plans[name, shape] = plan
        if len(self._plans) > MAX_GRAPHS:
            self._plans.popitem(last=False)
        plan.fill(self.pool, name, chunks, depths, [] if whole else active)
        return plan

    def states(self, name: str, model: LanguageModel, plan: StaticPlan, stats: EngineStats) -> Tensor:
        """The last hidden states of a plan's tokens, (T, D), including padding; valid until the next batch.

        Raises:
            ModelError: Graphs are required, but the model cannot be captured.
        """
        if self.capture and plan.graph is None and plan.runs > 0 and name not in self._refused:
            try:
                self._capture(name, model, plan)
                stats.decode_ticks["captured"] += 1
            except RuntimeError as error:
                first: BaseException = error
                while first.__context__ is not None:  # after a failed capture, ending it raises as well
                    first = first.__context__
                self._refuse(name, model, str(first).strip().splitlines()[0], error)
        plan.runs += 1
        if plan.graph is None or plan.states is None:
            stats.decode_ticks["padded"] += 1
            return self._forward(name, model, plan)
        stats.decode_ticks["replayed"] += 1
        plan.graph.replay()
        return plan.states

    def _forward(self, name: str, model: LanguageModel, plan: StaticPlan) -> Tensor:
        plan.layers = self.pool.layers(name)
        try:
            return model.token_states(plan.ids, plan.positions, plan, plan.active, soft_prompt=False)
        finally:
            plan.layers = ()  # these views would keep a released arena alive

    def _capture(self, name: str, model: LanguageModel, plan: StaticPlan) -> None:
        """Capture a plan's forward pass; nothing is computed."""
        with torch.cuda.device(self.device):
            if self._memory is None or self._stream is None:
                self._memory, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.stream(self._stream):
                # Other threads may use the device, such as a reward model's or one that pins a batch.
                graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
                try:
                    states = self._forward(name, model, plan)
                finally:
                    self._end(graph)
        plan.graph, plan.states = graph, states

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture. If this fails, PyTorch's allocators still route to the graph's pool, which must be undone here."""
        try:
            graph.capture_end()
        except RuntimeError:
            device = torch.cuda.current_device()
            torch._C._cuda_endAllocateToPool(device, self._memory)
            torch._C._cuda_releasePool(device, self._memory)
            self._memory = None
            self._failed.append(graph)  # kept alive: the allocator of pinned memory keeps querying it
            raise

    def _refuse(self, name: str, model: LanguageModel, reason: str, cause: Exception | None) -> None:
        problem = f"model {model.name}: its decode steps cannot be captured as CUDA graphs: {reason}"
        if self.required:
            raise ModelError(f"{problem}; set cuda_graphs=False to run without graphs") from cause
        logger.warning("%s; they run without graphs", problem)
        self._refused.add(name)


def _unsuited(model: LanguageModel) -> str | None:
    """The reason why a model cannot be captured, as far as its configuration shows; None if there is none."""
    rope = getattr(model.causal.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [each.get("rope_type") or "" for each in (rope, *rope.values()) if isinstance(each, dict)]
    if any("dynamic" in kind for kind in kinds):
        return "its rotary embedding (rope_type dynamic) is recomputed on the host as sequences grow"
    return None
