"""Execute a batch: one forward pass, then one draw for each sequence whose tokens are all computed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alignpro.engine.attention_plan import AttentionPlan
from alignpro.engine.faults import describe
from alignpro.engine.graphs import DecodeGraphs
from alignpro.engine.pool import KVPool
from alignpro.engine.prefix_tree import Node
from alignpro.engine.sampler import model_logprobs, position_seeds, sample
from alignpro.engine.scheduler import Batch, Chunk
from alignpro.engine.sequence import SampledSequence
from alignpro.engine.sequence_table import Ints, SequenceTable
from alignpro.engine.static_plan import StaticPlans
from alignpro.engine.stats import EngineStats
from alignpro.engine.stopping import find_end
from alignpro.engine.types import SamplingParams
from alignpro.models.admission import check_finite_sum, finite_sum
from alignpro.models.language_model import LanguageModel

logger = logging.getLogger(__name__)


@torch.no_grad()
def forward(
    model: LanguageModel,
    pool: KVPool,
    batch: Batch,
    stats: EngineStats,
    table: SequenceTable,
    plans: StaticPlans,
    graphs: DecodeGraphs | None = None,
) -> Tensor:
    """Compute a batch. Returns the hidden states from which the sequences of ``batch.to_sample`` draw, (B, D).

    With ``graphs``, they compute the sequences that decode, and a pass without a graph computes the chunks. Without them,
    sequences that decode and chunks share a pass, and ``plans`` serve batches without chunks. Sequences that decode may be
    put in another order. If this raises, nothing counts as computed.
    """
    stats.ticks += 1
    graphs = graphs if graphs and graphs.runs(batch.model) else None
    if len(batch.decoding) and (graphs or not batch.chunks):
        states = _decode(model, pool, batch, stats, table, plans, graphs)
        if batch.chunks or batch.drawing:
            states = torch.cat([states, _compute(model, batch.model, pool, batch.chunks, batch.drawing, stats)])
    else:
        whole = batch.in_chunks(table)
        states = _compute(model, batch.model, pool, whole.chunks, whole.drawing, stats)
    stats.computed["decode"] += len(batch.decoding)
    for chunk in batch.chunks:
        if chunk.write:
            chunk.segment.computed = chunk.end
        stats.computed[chunk.kind] += chunk.count
    return states


def _decode(
    model: LanguageModel,
    pool: KVPool,
    batch: Batch,
    stats: EngineStats,
    table: SequenceTable,
    plans: StaticPlans,
    graphs: DecodeGraphs | None,
) -> Tensor:
    """Compute the last tokens of the sequences that decode, which are put in order. Returns their states, (B, D)."""
    with _timed(stats, "plan"):
        decoding = table.gather(batch.decoding)
        batch.decoding = decoding.rows
        if graphs:
            plan = graphs.plan(batch.model, model, table, decoding)
        else:
            plan = plans.plan(batch.model, table, decoding, with_adapter=model.has_token_lora)
    with _timed(stats, "forward"):
        if graphs:
            return graphs.states(batch.model, model, plan, stats)[: len(batch.decoding)]
        return plan.forward(model, pool.layers(batch.model))[: len(batch.decoding)]


def _compute(
    model: LanguageModel,
    name: str,
    pool: KVPool,
    chunks: Sequence[Chunk],
    drawing: Sequence[SampledSequence],
    stats: EngineStats,
) -> Tensor:
    """Compute chunks in a pass of exactly their size. Returns the states from which sequences draw after it, (B, D)."""
    ends = [s.output if s.output_ids else s.node for s in drawing]
    if not chunks:
        return _known_states(ends)
    with _timed(stats, "plan"):
        plan = AttentionPlan(pool, name, chunks, pool.device)
    with _timed(stats, "forward"):
        active = plan.rows_of(name) if model.has_token_lora else True
        hidden = model.token_states(plan.ids, plan.positions, plan, active)  # (T, D)
        for node in {s.node: None for s in drawing if not s.output_ids}:
            assert node is not None
            if id(node) in plan.last_row:
                node.state = hidden[plan.last_row[id(node)]].clone()
        known = [end for end in ends if id(end) not in plan.last_row]
        if known:
            hidden = torch.cat([hidden, _known_states(known)])
        rows = plan.last_row | {id(end): len(plan.ids) + i for i, end in enumerate(known)}
        index = torch.tensor([rows[id(end)] for end in ends], dtype=torch.int64, device=pool.device)
        return hidden.index_select(0, index)


def _known_states(ends: Sequence[object]) -> Tensor:
    """The states kept from the ends of prompts, (B, D)."""
    states = [end.state for end in ends if isinstance(end, Node) and end.state is not None]
    assert len(states) == len(ends)
    return torch.stack(states)


@torch.no_grad()
def sample_tokens(
    models: Mapping[str, LanguageModel], table: SequenceTable, rows: Ints, states: Tensor, stats: EngineStats
) -> list[SampledSequence]:
    """Draw one token per sequence, and give a completion to each sequence that ends.

    Sequences with the same sampling parameters share one pass of the head. If a pass raises, none of its sequences has
    drawn.

    Args:
        models: Name → model.
        table: The running sequences.
        rows: (B,) the rows of those that draw.
        states: (B, D) the hidden states from which they draw.
        stats: Counters to update.

    Returns:
        The sequences that have ended.
    """
    if not len(rows):
        return []
    with _timed(stats, "sample"):
        return _sample_tokens(models, table, rows, states)


def _sample_tokens(
    models: Mapping[str, LanguageModel], table: SequenceTable, rows: Ints, states: Tensor
) -> list[SampledSequence]:
    total = finite_sum(states)  # a greedy token has log-probability 0, whatever its logit
    if table.sampled_alike(rows):  # as in most batches
        return _draw(models, table, rows, states, total)
    ended = []
    for alike in _alike(models, table.sequences(rows)):
        index = torch.tensor(alike, device=states.device)
        ended += _draw(models, table, rows[alike], states.index_select(0, index), total)
    return ended


def _alike(models: Mapping[str, LanguageModel], sequences: Sequence[SampledSequence]) -> list[list[int]]:
    """The places of sequences that share one pass of the head: those of the same head and sampling parameters."""
    lora = {name: bool(models[name].head.lora) for name in {sequence.model: None for sequence in sequences}}
    alike: dict[tuple[str | float, ...], list[int]] = {}
    for place, sequence in enumerate(sequences):
        params = sequence.params  # heads of one batch differ only in their LoRA
        head_name = sequence.model if lora[sequence.model] else ""
        recorded = -1 if params.top_logprobs is None else params.top_logprobs
        key = head_name, params.temperature, params.top_k, params.top_p, params.min_p, recorded
        alike.setdefault(key, []).append(place)
    return list(alike.values())


def _draw(
    models: Mapping[str, LanguageModel], table: SequenceTable, rows: Ints, states: Tensor, total: Tensor
) -> list[SampledSequence]:
    """Draw for B sequences of the same head and sampling parameters; ``total`` is the `finite_sum` of all states."""
    first = table.sequences(rows[:1])[0]
    model, params = models[first.model], first.params
    tokens, logprobs = sample(states, model.head, params, _seeds(table, rows, params, states.device))
    on_host, own_logprobs, of_states = _to_host(tokens, logprobs, total)
    for check in (of_states, float(own_logprobs.sum())):
        check_finite_sum(model.name, check)
    if (recorded := params.top_logprobs) is not None:
        known = model_logprobs(states, model.head, tokens, recorded)
        for sequence, position, record in zip(table.sequences(rows), table.columns["count"][rows], known, strict=True):
            sequence.model_logprobs[position:] = [record]  # in place of that of a draw that raised afterwards
    may_end = table.add_tokens(rows, on_host, own_logprobs)
    sequences = table.sequences(rows[may_end])
    for sequence in sequences:
        _end_if_stopped(sequence, model.tokenizer)
    return [sequence for sequence in sequences if sequence.completion is not None]


def _seeds(table: SequenceTable, rows: Ints, params: SamplingParams, device: torch.device) -> Tensor:
    """The seeds of the next tokens of B sequences, (B,) int64; zeros for greedy ones, which do not read them."""
    if params.temperature == 0:
        return torch.zeros(len(rows), dtype=torch.int64, device=device)
    noise = position_seeds(table.columns["seed_state"][rows], table.columns["count"][rows])
    return torch.from_numpy(noise).to(device, non_blocking=True)


def _to_host(tokens: Tensor, logprobs: Tensor, total: Tensor) -> tuple[Ints, NDArray[Any], float]:
    """Tokens (B,) int64, their log-probabilities (B,) and a sum, on the host."""
    if tokens.device.type == "cpu":
        return tokens.numpy(), logprobs.numpy(), total.item()
    # One copy, for which the host waits once. A float64 holds every token id exactly.
    drawn = torch.cat([tokens.double(), logprobs, total.reshape(1)]).cpu().numpy()  # (2 B + 1,)
    count = len(tokens)
    return drawn[:count].astype(np.int64), drawn[count:-1], float(drawn[-1])


def settle_draw(sequence: SampledSequence, before: int, models: Mapping[str, LanguageModel]) -> bool:
    """Whether a sequence has drawn in a draw that has raised, which is completed if it was cut short.

    Args:
        sequence: The sequence.
        before: The number of tokens that it had drawn before.
        models: Name → model.
    """
    if sequence.completion is None and len(sequence.output_ids) == before:
        return False
    if sequence.completion is None:
        _end_if_stopped(sequence, models[sequence.model].tokenizer)
    return True


def _end_if_stopped(sequence: SampledSequence, tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        end = find_end(sequence.output_ids, sequence.params, tokenizer)
    except Exception as error:  # raised by the tokenizer on this sequence's tokens
        logger.exception("the search for a stop text raised an exception")
        sequence.fail(describe("the search for a stop text", error))
    else:
        if end is not None:
            sequence.end(*end)


@contextmanager
def _timed(stats: EngineStats, phase: str) -> Iterator[None]:
    started = perf_counter()
    yield
    stats.seconds[phase] += perf_counter() - started
