"""Execute a batch: one forward pass, then one draw for each sequence whose tokens are all computed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alignpro.engine.attention_plan import AttentionPlan
from alignpro.engine.faults import describe
from alignpro.engine.graphs import DecodeGraphs, StaticPlan
from alignpro.engine.pool import KVPool
from alignpro.engine.prefix_tree import Node
from alignpro.engine.sampler import position_seeds, sample
from alignpro.engine.scheduler import Batch
from alignpro.engine.sequence import SampledSequence
from alignpro.engine.stats import EngineStats
from alignpro.engine.stopping import find_end
from alignpro.models.admission import check_finite
from alignpro.models.language_model import LanguageModel

logger = logging.getLogger(__name__)


@torch.no_grad()
def forward(
    model: LanguageModel, pool: KVPool, batch: Batch, stats: EngineStats, graphs: DecodeGraphs | None = None
) -> Tensor:
    """Compute the batch's chunks. Returns the hidden states from which its sequences draw, (B, D).

    If this raises, no chunk counts as computed. With ``graphs``, they run decode batches.
    """
    stats.ticks += 1
    ends = [s.output if s.output_ids else s.node for s in batch.to_sample]
    if not batch.chunks:
        return _known_states(ends)
    with _timed(stats, "plan"):
        static = graphs.plan(batch.model, model, batch.chunks) if graphs else None
        plan = static or AttentionPlan(pool, batch.model, batch.chunks, model.device)
    with _timed(stats, "forward"):
        if isinstance(plan, StaticPlan):
            assert graphs is not None
            hidden = graphs.states(batch.model, model, plan, stats)  # (T, D), padding included
        else:
            active = plan.rows_of(batch.model) if model.has_token_lora else True
            hidden = model.token_states(plan.ids, plan.positions, plan, active)  # (T, D)
        for node in {s.node: None for s in batch.to_sample if not s.output_ids}:
            assert node is not None
            if id(node) in plan.last_row:
                node.state = hidden[plan.last_row[id(node)]].clone()
        known = [end for end in ends if id(end) not in plan.last_row]
        if known:
            hidden = torch.cat([hidden, _known_states(known)])
        rows = plan.last_row | {id(end): len(plan.ids) + i for i, end in enumerate(known)}
        index = torch.tensor([rows[id(end)] for end in ends], dtype=torch.int64, device=model.device)
        states = hidden.index_select(0, index)
        for chunk in batch.chunks:
            if chunk.write:
                chunk.segment.computed = chunk.end
            stats.computed[chunk.kind] += chunk.count
        return states


def _known_states(ends: Sequence[object]) -> Tensor:
    """The states kept from the ends of prompts, (B, D)."""
    states = [end.state for end in ends if isinstance(end, Node) and end.state is not None]
    assert len(states) == len(ends)
    return torch.stack(states)


@torch.no_grad()
def sample_tokens(
    models: Mapping[str, LanguageModel], sequences: Sequence[SampledSequence], states: Tensor, stats: EngineStats
) -> None:
    """Draw one token per sequence from (B, D) states, and give a completion to each sequence that ends.

    Sequences with the same sampling parameters share one pass of the head. If a pass raises, none of its sequences has
    drawn.
    """
    if sequences:
        with _timed(stats, "sample"):
            _sample_tokens(models, sequences, states)


def _sample_tokens(models: Mapping[str, LanguageModel], sequences: Sequence[SampledSequence], states: Tensor) -> None:
    check_finite(models[sequences[0].model].name, states)  # a greedy token has log-probability 0, whatever its logit
    positions = [len(sequence.output_ids) for sequence in sequences]
    noise = position_seeds([sequence.seed for sequence in sequences], positions)
    seeds = torch.from_numpy(noise).to(states.device)  # (B,)
    heads = {name: models[name].head for name in {sequence.model: None for sequence in sequences}}
    alike: dict[tuple[str | float, ...], list[int]] = {}
    for row, sequence in enumerate(sequences):
        params, lora = sequence.params, heads[sequence.model].lora  # heads of one batch differ only in their LoRA
        head_name = sequence.model if lora else ""
        alike.setdefault((head_name, params.temperature, params.top_k, params.top_p, params.min_p), []).append(row)
    for rows in alike.values():
        head, params = heads[sequences[rows[0]].model], sequences[rows[0]].params
        if len(rows) == len(sequences):
            tokens, logprobs = sample(states, head, params, seeds)
        else:
            index = torch.tensor(rows, device=states.device)
            tokens, logprobs = sample(states.index_select(0, index), head, params, seeds.index_select(0, index))
        check_finite(models[sequences[rows[0]].model].name, logprobs)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.double().tolist(), strict=True):
            sequences[row].output_ids.append(token)
            sequences[row].logprobs.append(logprob)
            _end_if_stopped(sequences[row], models[sequences[row].model].tokenizer)


def settle_draw(sequence: SampledSequence, models: Mapping[str, LanguageModel]) -> bool:
    """Whether a sequence has drawn in a draw that has raised, which is completed if it was cut short.

    The last token of one that has drawn is not computed yet.
    """
    del sequence.output_ids[len(sequence.logprobs) :]  # without its log-probability, a token is drawn again
    assert sequence.output is not None
    if sequence.completion is None and sequence.output.complete:
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
