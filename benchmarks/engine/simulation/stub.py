"""What stands in for the models and for CUDA graphs: they compute nothing, and record what they would have computed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from alignpro.engine.arena import MovingArena
from alignpro.engine.graphs import DecodeGraphs
from alignpro.engine.static_plan import StaticPlan
from alignpro.models.attention_interface import AttentionBackend, AttentionSettings
from alignpro.models.head import Head
from alignpro.models.language_model import LanguageModel
from alignpro.models.paged_attention import PagedAttention
from benchmarks.workload import ModelShape

WIDTH = 8
"""Width of the hidden states that the stub returns."""
HEAD_DIM = 128
"""Width of a key of the real models; a stub's is 1, so that its pool takes a 128th of the memory."""
SETTINGS = AttentionSettings(1.0)

How = Literal["eager", "padded", "captured", "replayed"]


@dataclass
class Pass:
    """A forward pass of a model."""

    model: str
    how: How
    """``eager`` with exact shapes; ``padded``: the first of a shape, before it is captured."""
    rows: int
    """Tokens computed, padding included."""
    tokens: int
    """Tokens computed, without padding."""
    levels: int
    """Levels of the cascade."""
    keys: int
    """Keys and values read, in tokens of one layer: each segment's once."""
    scores: int
    """Pairs of a query and a key."""
    seconds: float = 0.0
    """Spent by the stub."""


class StubModel:
    """What the engine uses of a `LanguageModel`; its states are zeros.

    Args:
        name: Its name in the engine.
        shape: The model that it stands for; the ratio of two models' page sizes is the real one.
        mean_length: Mean number of tokens after which a sequence ends: the size of the head.
        log: Where its passes are recorded.
    """

    is_base = False
    has_token_lora = False
    invocation: tuple[int, ...] = ()
    virtual_tokens = 0
    tokenizer = None

    def __init__(self, name: str, shape: ModelShape, mean_length: int, log: list[Pass]) -> None:
        self.name, self.shape, self.log, self.context_length = name, shape, log, 1 << 17
        self.device = torch.device("cpu")
        self.vocabulary = shape.vocabulary
        self.head = Head(torch.zeros(mean_length, WIDTH), None, None)
        """As many tokens as the mean length, the first of which ends a sequence."""
        self.causal = SimpleNamespace(config=PreTrainedConfig())
        self._states = torch.zeros(1 << 16, WIDTH)

    @property
    def graph_key(self) -> tuple[object, ...]:
        """See `LanguageModel.graph_key`: as after a training step that updates the weights in place."""
        return (id(self),)

    @property
    def parts(self) -> tuple[StubModel, ...]:
        """It is no mixture."""
        return (self,)

    def shares_weights(self, other: LanguageModel) -> bool:
        """See `LanguageModel.shares_weights`."""
        return self is other

    def weights_updated(self) -> None:
        """See `LanguageModel.weights_updated`."""

    def token_states(
        self,
        ids: Tensor,
        positions: Tensor,
        attention: AttentionBackend,
        active: Any = True,
        *,
        soft_prompt: bool = True,
    ) -> Tensor:
        """See `LanguageModel.token_states`."""
        started = time.perf_counter()
        if isinstance(attention, PagedAttention):
            self.log.append(_pass_of(self.name, "eager", attention, len(ids)))
            self.log[-1].seconds = time.perf_counter() - started
        else:  # what learns the geometry of the keys
            query, key = torch.zeros(1, 1, len(ids), 1), torch.zeros(1, self.shape.kv_heads, len(ids), 1).half()
            for layer in range(self.shape.layers):
                attention.attend(layer, query.expand(1, self.shape.kv_heads, len(ids), 1), key, key, SETTINGS)
        return self._states[: len(ids)]


class StubArena(MovingArena):
    """Pages that say that they never move, as those of a `FixedArena`."""

    num_moves = 0

    def resize(self, count: int, total: int) -> None:
        """See `Arena.resize`."""
        super().resize(count, total)
        self.num_moves = 0


class _Replay:
    """A graph that computes nothing."""

    def replay(self) -> None:
        """Do nothing."""


class StubGraphs(DecodeGraphs):
    """Plans as for CUDA graphs, whose capture and replay compute nothing."""

    def __init__(self, *args: Any, log: list[Pass], **options: Any) -> None:
        super().__init__(*args, **options)
        self._log = log

    def states(self, name: str, model: LanguageModel, plan: StaticPlan, stats: Any) -> Tensor:
        """See `DecodeGraphs.states`."""
        had_graph, before = plan.graph is not None, len(self._log)
        states = super().states(name, model, plan, stats)
        del self._log[before:]  # of a pass that ran without a graph
        started = time.perf_counter()
        how: How = "replayed" if had_graph else "captured" if plan.graph is not None else "padded"
        self._log.append(_pass_of(name, how, plan, plan.shape.rows))
        self._log[-1].seconds = time.perf_counter() - started
        return states

    def _capture(self, name: str, model: LanguageModel, plan: StaticPlan) -> None:
        plan.graph, plan.states = _Replay(), plan.forward(model, self.pool.layers(name))  # type: ignore[assignment]


def _pass_of(model: str, how: How, attention: PagedAttention, rows: int) -> Pass:
    keys = scores = 0
    for level in attention.levels:
        counts = (level.cu_queries[1:] - level.cu_queries[:-1]).clamp_min(0)
        seen = torch.where(counts > 0, level.key_lengths, 0)
        keys += int(seen.sum())
        scores += int((seen.long() * counts).sum())
    tokens = int((attention.levels[0].query_positions >= 0).sum()) if how != "eager" else rows
    return Pass(model, how, rows, tokens, len(attention.levels), keys, scores)
