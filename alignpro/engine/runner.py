"""Execute a batch: one forward pass, then one draw for each sequence whose tokens are all computed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alignpro.engine.attention_plan import AttentionPlan
from alignpro.engine.faults import describe
from alignpro.engine.graphs import DecodeGraphs
from alignpro.engine.host_copy import HostTokens, to_device
from alignpro.engine.pool import KVPool, Segment
from alignpro.engine.prefix_tree import Node
from alignpro.engine.sampler import model_logprobs, sample
from alignpro.engine.scheduler import Batch, rows_of
from alignpro.engine.sequence import SampledSequence
from alignpro.engine.sequence_arrays import Ints
from alignpro.engine.sequence_table import SequenceTable
from alignpro.engine.static_plan import StaticPlans
from alignpro.engine.stats import EngineStats
from alignpro.engine.stopping import find_end
from alignpro.engine.types import TokenLogprobs
from alignpro.models.admission import check_finite_sum, finite_sum
from alignpro.models.language_model import LanguageModel

logger = logging.getLogger(__name__)


class Drawable(NamedTuple):
    """What B sequences draw from, on the device."""

    states: Tensor
    """(B, D): the hidden states."""
    seeds: Tensor
    """(B,) int64: the seeds of the next tokens. Greedy sequences do not read them."""

    def at(self, places: list[int]) -> Drawable:
        """That of some of the sequences."""
        (index,) = to_device([np.array(places, np.int64)], self.states.device)
        return Drawable(self.states.index_select(0, index), self.seeds.index_select(0, index))


class LaunchedPass(NamedTuple):
    """A forward pass that has been launched, and those of its sequences that go on."""

    batch: Batch
    states: Drawable
    """What all the sequences of the pass draw from."""
    places: list[int] | None = None
    """The places of the batch's sequences among them; None if it has all of them."""

    def drawable(self) -> Drawable:
        """What the sequences of the batch draw from."""
        return self.states if self.places is None else self.states.at(self.places)


class Drawn(NamedTuple):
    """A token for each of B sequences of the same head and sampling parameters, on its way to the host."""

    model: LanguageModel
    rows: Ints
    """(B,): the rows of the sequences."""
    tokens: Tensor
    """(B,) int64, on the device."""
    on_host: HostTokens
    records: list[TokenLogprobs]
    """Of each token what `SamplingParams.top_logprobs` asks for; empty if nobody does."""

    def at(self, places: Ints) -> Drawn:
        """That of some of the sequences."""
        (index,) = to_device([places], self.tokens.device)
        records = [self.records[place] for place in places.tolist()] if self.records else []
        return Drawn(self.model, self.rows[places], self.tokens[index], self.on_host.at(places), records)


def forward(
    model: LanguageModel,
    pool: KVPool,
    batch: Batch,
    stats: EngineStats,
    table: SequenceTable,
    plans: StaticPlans,
    graphs: DecodeGraphs | None = None,
    drawn: Sequence[Drawn] = (),
) -> Drawable:
    """Compute a batch. Returns what the sequences of ``batch.to_sample`` draw from, valid until the next batch.

    With ``graphs``, they compute the sequences that decode, and a pass without a graph computes the chunks. Without them,
    sequences that decode and chunks share a pass, and ``plans`` serve batches without chunks. Sequences that decode may be
    put in another order. If this raises, nothing counts as computed.

    The tokens of those that decode may be among ``drawn``, so that the host does not know them yet; the table must count
    them already (`SequenceTable.presume`). Then it is not known either who is computed in vain: `AsyncScheduling` counts them.
    """
    stats.ticks += 1
    graphs = graphs if graphs and graphs.runs(batch.model) else None
    if len(batch.decoding) and (graphs or not batch.chunks):
        drawable = _decode(model, pool, batch, stats, table, plans, graphs, drawn)
        if batch.chunks or batch.drawing:
            others = _compute(model, batch, pool, stats, table)
            drawable = Drawable(*(torch.cat(both) for both in zip(drawable, others, strict=True)))
    else:
        drawable = _compute(model, batch.in_chunks(table), pool, stats, table)
    if not drawn:
        stats.computed["decode"] += len(batch.decoding)
    for chunk in batch.chunks:
        if chunk.write:
            chunk.segment.computed = chunk.end
        stats.computed[chunk.kind] += chunk.count
    return drawable


def _decode(
    model: LanguageModel,
    pool: KVPool,
    batch: Batch,
    stats: EngineStats,
    table: SequenceTable,
    plans: StaticPlans,
    graphs: DecodeGraphs | None,
    drawn: Sequence[Drawn],
) -> Drawable:
    """Compute the last tokens of the sequences that decode, which are put in order."""
    with _Timed(stats, "plan"):
        decoding = table.gather(batch.decoding)
        batch.decoding = decoding.rows
        if graphs:
            plan = graphs.plan(batch.model, model, table, decoding)
        else:
            plan = plans.plan(batch.model, table, decoding, with_adapter=model.has_token_lora)
        if drawn:
            _put_drawn(drawn, batch.decoding, plan.ids)
    count = len(batch.decoding)
    with _Timed(stats, "forward"):
        if graphs:
            return Drawable(graphs.states(batch.model, model, plan, stats)[:count], plan.seeds[:count])
        return Drawable(plan.forward(model, pool.layers(batch.model))[:count], plan.seeds[:count])


def _put_drawn(drawn: Sequence[Drawn], rows: Ints, ids: Tensor) -> None:
    """Write the tokens drawn for N rows to the first N of ``ids``, on the device, which keep those of rows that drew none."""
    from_rows = drawn[0].rows if len(drawn) == 1 else np.concatenate([each.rows for each in drawn])
    tokens = drawn[0].tokens if len(drawn) == 1 else torch.cat([each.tokens for each in drawn])
    if np.array_equal(from_rows, rows):  # as in most batches
        ids[: len(rows)] = tokens
        return
    places = np.full(max(from_rows.max(), rows.max()) + 1, -1)
    places[from_rows] = np.arange(len(from_rows))
    places = places[rows]
    if len(into := np.flatnonzero(places >= 0)):  # else these rows are another model's
        index, into_index = to_device([places[into], into], ids.device)
        ids.index_copy_(0, into_index, tokens.index_select(0, index))


def _compute(model: LanguageModel, batch: Batch, pool: KVPool, stats: EngineStats, table: SequenceTable) -> Drawable:
    """Compute the chunks of a batch in a pass of exactly their size, for the sequences that draw after them."""
    ends = [sequence.last_segment for sequence in batch.drawing]
    with _Timed(stats, "plan"):
        seeds = table.seeds(rows_of(batch.drawing))
        if not batch.chunks:
            return Drawable(_known_states(ends), *to_device([seeds], pool.device))
        adapted = batch.model if model.has_token_lora else None
        plan = AttentionPlan(pool, batch.model, batch.chunks, ends, seeds, adapted)
    with _Timed(stats, "forward"):
        hidden = model.token_states(plan.ids, plan.positions, plan, plan.active)  # (T, D)
        for end in dict.fromkeys(ends):
            if isinstance(end, Node) and id(end) in plan.last_row:
                end.state = hidden[plan.last_row[id(end)]].clone()
        if plan.not_computed:
            hidden = torch.cat([hidden, _known_states(plan.not_computed)])
        return Drawable(hidden.index_select(0, plan.drawn_rows), plan.seeds)


def _known_states(ends: Sequence[Segment]) -> Tensor:
    """The states kept from the ends of prompts, (B, D)."""
    states = [end.state for end in ends if isinstance(end, Node) and end.state is not None]
    assert len(states) == len(ends)
    return torch.stack(states)


def draw(
    models: Mapping[str, LanguageModel], table: SequenceTable, rows: Ints, drawable: Drawable, stats: EngineStats
) -> list[Drawn]:
    """Draw one token for each of B > 0 sequences, for which the host does not wait; nothing is added to any sequence.

    Sequences with the same sampling parameters share one pass of the head. A draw that has raised may be repeated: it gives
    the same tokens.

    Args:
        models: Name → model.
        table: The running sequences.
        rows: (B,) the rows of those that draw.
        drawable: What they draw from.
        stats: Counters to update.
    """
    with _Timed(stats, "sample"):
        total = finite_sum(drawable.states)  # a greedy token has log-probability 0, whatever its logit
        if table.sampled_alike(rows):  # as in most batches
            return [_draw(models, table, rows, drawable, total)]
        groups = _alike(models, table.sequences(rows))
        return [_draw(models, table, rows[alike], drawable.at(alike), total) for alike in groups]


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
    models: Mapping[str, LanguageModel], table: SequenceTable, rows: Ints, drawable: Drawable, total: Tensor
) -> Drawn:
    """Draw for B sequences of the same head and sampling parameters; ``total`` is the `finite_sum` of all states."""
    first = table.sequences(rows[:1])[0]
    model, params = models[first.model], first.params
    tokens, logprobs = sample(drawable.states, model.head, params, drawable.seeds)
    records: list[TokenLogprobs] = []
    if params.top_logprobs is not None:
        records = model_logprobs(drawable.states, model.head, tokens, params.top_logprobs)
    return Drawn(model, rows, tokens, HostTokens(tokens, logprobs, total), records)


def add_drawn(table: SequenceTable, drawn: Drawn, stats: EngineStats) -> list[SampledSequence]:
    """Wait for drawn tokens and add them to their sequences, each of which that ends gets its completion.

    If this raises an `Exception`, some may have got theirs: see `settle`.

    Returns:
        The sequences that have ended.
    """
    with _Timed(stats, "sample"):
        rows, (tokens, logprobs, of_states) = drawn.rows, drawn.on_host.wait()
        check_finite_sum(drawn.model.name, of_states)
        if drawn.records:
            for sequence, position, record in zip(
                table.sequences(rows), table.counts(rows), drawn.records, strict=True
            ):
                sequence.model_logprobs[position:] = [record]  # in place of that of one that raised afterwards
        sequences, of_logprobs = table.add_tokens(rows, tokens, logprobs)
        check_finite_sum(drawn.model.name, of_logprobs)
        for sequence in sequences:
            _end_if_stopped(sequence, drawn.model.tokenizer)
        return [sequence for sequence in sequences if sequence.completion is not None]


def settle(sequence: SampledSequence, before: int, model: LanguageModel) -> bool:
    """Whether a sequence has got its token although `add_drawn` raised; what that left undone for it is done.

    Args:
        sequence: The sequence.
        before: The number of tokens that it had before.
        model: Its model.
    """
    if sequence.completion is None and len(sequence.output_ids) == before:
        return False
    if sequence.completion is None:
        _end_if_stopped(sequence, model.tokenizer)
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


class _Timed:
    """Counts the seconds of a phase that does not raise; `contextlib.contextmanager` takes several times as long."""

    def __init__(self, stats: EngineStats, phase: str) -> None:
        self._stats, self._phase = stats, phase

    def __enter__(self) -> None:
        self._started = perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._stats.seconds[self._phase] += perf_counter() - self._started
