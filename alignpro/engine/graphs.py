"""Decode batches in a few fixed shapes, each captured once as a CUDA graph and replayed.

A decode batch consists of hundreds of small kernels, which a GPU runs faster than Python can launch them. A CUDA graph
needs a single launch, but fixes all addresses and grid sizes. So the sequences that compute one token each are padded to
one of a few `Shape`s, and the inputs of each batch are copied into static buffers.

| owns | does not own |
|---|---|
| shapes, their buffers, the captured graphs | attention (`paged_attention.PagedAttention`), the head and sampling |

A padding row attends to no key (its position is −1), and its own key is not written (slot −1). The head is not captured:
there is one pass for each set of sampling parameters, these sets differ between batches, and the few kernels involved are
autotuned on first use.

A graph holds the addresses of its buffers, the pages and the weights. It is dropped when the pages move
(`KVPool.num_moves`; those of a `FixedArena` never do), or when weights move or adapters are switched
(`LanguageModel.graph_key`).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from alignpro.engine.pool import KVPool
from alignpro.engine.sequence_table import DecodeRows, Ints, SequenceTable
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
_NO_ROWS = np.zeros(0, np.int64)


class Shape(NamedTuple):
    """The sizes of a batch that a graph fixes. They are coarse, so that a run needs few graphs."""

    rows: int
    """T: the number of tokens, including padding."""
    levels: tuple[tuple[int, int], ...]
    """For each depth, the number of segments S and the maximum number of pages per segment, including padding."""
    active: int
    """Number of tokens that a token LoRA acts on, including padding; `ALL_ROWS` for all of them."""

    @classmethod
    def for_batch(cls, tokens: int, levels: Sequence[tuple[int, int]], active: int) -> Shape:
        """The shape for ``tokens`` tokens, where the adapter acts on ``active`` of them or on `ALL_ROWS`."""
        some = active > 0
        rows = padded(tokens + some)  # an adapter that acts on some tokens needs a padding row to act on as well
        sizes = tuple((_padded_segments(rows, s), power_of_two(pages)) for s, pages in levels)
        return cls(rows, sizes, rows if some else active)

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
    """Round up to 8, 16, 32, …, 256, then to multiples of 64 up to 512, of 128 up to 1024, and so on.

    Up to some 256 rows a decode step takes as long as reading the weights, and more rows cost little. Beyond that its
    products count, and at most a quarter is added.
    """
    return max(8, power_of_two(count)) if count <= 256 else -(-count // (step := power_of_two(count) // 8)) * step


def _padded_segments(rows: int, segments: int) -> int:
    """Round up to 1 (what all sequences share), an eighth of the rows (what many share), or all rows."""
    return next(size for size in (1, rows // 8, rows) if segments <= size)


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


class _HostLevel(NamedTuple):
    """A level of the host's buffer; see `PagedKeys`."""

    cu_queries: Any
    page_table: Any
    key_lengths: Any
    query_positions: Any
    key_starts: Any


class StaticPlan(PagedAttention):
    """The attention metadata of a batch in static buffers, and the graph that reads them."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        self.memory = torch.zeros(sum(shape.spaces), dtype=torch.int32, device=device)
        self.ids, self.positions, slots, active, levels = _Buffers.within(self.memory, shape)
        self.active = active if shape.active > 0 else shape.active == ALL_ROWS
        super().__init__((), slots, levels, in_order=False)  # padding rows come after a segment's queries
        self.runs = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.states: Tensor | None = None
        """(T, D): the buffer into which the graph writes the last hidden states."""
        self._host_memory = torch.zeros(len(self.memory), dtype=torch.int32, pin_memory=self.memory.is_cuda)
        self._copied = torch.cuda.Event() if self.memory.is_cuda else None
        host = _Buffers.within(self._host_memory, shape)
        self._host = [x.numpy() for x in (host.ids, host.positions, host.slots, host.active)]
        self._host_levels = [
            _HostLevel(*(getattr(level, name).numpy() for name in _HostLevel._fields)) for level in host.levels
        ]

    def fill(self, table: SequenceTable, batch: DecodeRows, active: Ints) -> None:
        """Copy a batch that fits into the buffers.

        Args:
            table: The running sequences.
            batch: Those of the batch.
            active: The rows that a token LoRA acts on; empty if it acts on all or on none.
        """
        if self._copied is not None:
            self._copied.synchronize()  # the host's buffer may be written again
        ids, positions, slots, active_rows = self._host
        count, rows = len(batch.rows), self.shape.rows
        counts = table.columns["count"][batch.rows]
        last = counts - 1
        at = table.starts[batch.outputs] + last
        table.lengths[batch.outputs] = counts
        ids[:count], ids[count:] = table.columns["last_token"][batch.rows], 0
        positions[:count], positions[count:] = at, 0
        slots[:count], slots[count:] = table.columns["slots_from"][batch.rows] + last, -1
        active_rows[: len(active)], active_rows[len(active) :] = active, rows - 1
        for level, own in zip(self._host_levels, batch.levels, strict=True):
            segments = len(own.begins)
            level.query_positions[:count], level.query_positions[count:] = np.where(own.reached, at, -1), -1
            # A row without a segment at this level is counted with the preceding segment: at query position −1 it attends
            # to none of that segment's keys.
            level.cu_queries[:segments], level.cu_queries[segments:] = own.begins, rows
            level.key_lengths[:segments] = table.lengths[own.segments]
            level.key_starts[:segments] = table.starts[own.segments]
            width = min(level.page_table.shape[1], table.pages.shape[1])
            level.page_table[:segments, :width] = table.pages.take(own.segments, axis=0)[:, :width]
        self.memory.copy_(self._host_memory, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


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
        self._num_moves = pool.num_moves
        self._widths: dict[tuple[str, int], int] = {}  # model, depth → the largest number of pages per segment so far
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

    def drop_moved(self) -> None:
        """Drop all graphs if the pages have got another address."""
        if self._num_moves != self.pool.num_moves:
            self.clear()
            self._num_moves = self.pool.num_moves

    def runs(self, name: str) -> bool:
        """Whether the decode batches of a model have fixed shapes."""
        return name not in self._refused

    def plan(self, name: str, model: LanguageModel, table: SequenceTable, batch: DecodeRows) -> StaticPlan:
        """The plan of a batch, valid until the next one."""
        self.drop_moved()
        active = table.rows_of_model(batch.rows, name) if model.has_token_lora else _NO_ROWS
        whole = not model.has_token_lora or len(active) == len(batch.rows)
        levels = [
            (len(level.begins), self._width(name, depth, int(table.max_pages[level.segments].max())))
            for depth, level in enumerate(batch.levels)
        ]
        shape = Shape.for_batch(len(batch.rows), levels, ALL_ROWS if whole else len(active))
        plan = self._plans.pop((name, shape), None) or StaticPlan(shape, self.device)
        self._plans[name, shape] = plan
        if len(self._plans) > MAX_GRAPHS:
            self._plans.popitem(last=False)
        plan.fill(table, batch, _NO_ROWS if whole else active)
        return plan

    def _width(self, name: str, depth: int, pages: int) -> int:
        """The number of pages per segment: it never becomes smaller, so that shapes recur."""
        self._widths[name, depth] = width = max(self._widths.get((name, depth), 1), power_of_two(pages))
        return width

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
            self._memory = self._memory or torch.cuda.graph_pool_handle()
            self._stream = self._stream or torch.cuda.Stream()  # just one: cuBLAS keeps a workspace for each
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
            generator = torch.cuda.default_generators[device]  # else it believes that the capture goes on
            generator.graphsafe_set_state(generator.clone_state())
            raise

    def _refuse(self, name: str, model: LanguageModel, reason: str, cause: Exception | None) -> None:
        problem = f"model {model.name}: its decode steps cannot be captured as CUDA graphs: {reason}"
        if self.required:
            raise ModelError(f"{problem}; set cuda_graphs=False to run without graphs") from cause
        logger.warning("%s; they run without graphs", problem)
        self._refused.add(name)


def _unsuited(model: LanguageModel) -> str | None:
    """The reason why a model cannot be captured, as far as its configuration shows; None if there is none."""
    configs = [part.causal.config.get_text_config() for part in model.parts]
    ropes = [getattr(config, "rope_parameters", None) or {} for config in configs]
    kinds = [e.get("rope_type") or "" for rope in ropes for e in (rope, *rope.values()) if isinstance(e, dict)]
    for kind in ("dynamic", "longrope"):
        if any(kind in each for each in kinds):
            return f"its rotary embedding (rope_type {kind}) depends on the longest sequence, which the host looks up"
    return None
