"""Decode batches in a few fixed shapes, each captured once as a CUDA graph and replayed.

A decode batch consists of hundreds of small kernels, which a GPU runs faster than Python can launch them. A CUDA graph
needs a single launch, but fixes all addresses and grid sizes. So the sequences that compute one token each are padded to
one of a few shapes (`static_plan`), whose buffers the graph reads.

| owns | does not own |
|---|---|
| the captured graphs, when they are out of date | shapes and buffers (`static_plan`), the head and sampling |

The head is not captured: there is one pass for each set of sampling parameters, these sets differ between batches, and the
few kernels involved are autotuned on first use.

A graph holds the addresses of its buffers, the pages and the weights. It is dropped when the pages move
(`KVPool.num_moves`; those of a `FixedArena` never do), or when weights move or adapters are switched
(`LanguageModel.graph_key`).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from alignpro.engine.plan_buffers import padded
from alignpro.engine.pool import KVPool
from alignpro.engine.sequence_arrays import DecodeRows
from alignpro.engine.sequence_table import SequenceTable
from alignpro.engine.static_plan import StaticPlan, StaticPlans
from alignpro.engine.stats import EngineStats
from alignpro.errors import ModelError
from alignpro.models.language_model import LanguageModel

logger = logging.getLogger(__name__)

MAX_GRAPHS = 64
"""Maximum number of graphs kept, least recently used dropped first. Each holds an output and some MB of driver memory."""


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
        self._plans = StaticPlans(device, MAX_GRAPHS, padded)
        self._graph_keys: dict[str, tuple[object, ...]] = {}
        self._num_moves = pool.num_moves
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
            self._plans.drop(name)
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
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # a replay may still run when the next pass is planned
            self.clear()
            self._num_moves = self.pool.num_moves

    def runs(self, name: str) -> bool:
        """Whether the decode batches of a model have fixed shapes."""
        return name not in self._refused

    def plan(self, name: str, model: LanguageModel, table: SequenceTable, batch: DecodeRows) -> StaticPlan:
        """The plan of a batch, valid until the next one."""
        self.drop_moved()
        return self._plans.plan(name, table, batch, with_adapter=model.has_token_lora)

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
            return plan.forward(model, self.pool.layers(name))
        stats.decode_ticks["replayed"] += 1
        plan.graph.replay()
        return plan.states

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
                    states = plan.forward(model, self.pool.layers(name))
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
