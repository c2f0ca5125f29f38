"""Execute batches so that a failure is confined to the sequences that cause it.

The tokens that a sequence draws do not depend on what it is batched with, so a batch may be split in any way. A batch
that raises is halved until the chunks are found that raise by themselves. The sequences that need those chunks fail; all others
continue unaffected. One such chunk among N costs about 2 · log₂ N passes; a batch that does not raise costs nothing extra.
If memory runs out, single chunks are halved too, and later passes are limited to a size that fits.

| owns | does not own |
|---|---|
| which part of a batch raises, how many tokens fit in a pass | the passes themselves, pages, follow-ups of a failure |

A step is two calls. `Executor.begin` computes a batch and launches the draws; `Executor.finish` waits for the tokens. In between,
the next pass may be launched (`Executor.forward_ahead`, for `async_scheduling`).

Tokens count as computed only after their pass has succeeded (`runner.forward`), so data written by a failed pass is never
read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from sys import maxsize
from typing import NamedTuple

import numpy as np
import torch

from alignpro.engine.faults import describe, is_fatal, is_out_of_memory
from alignpro.engine.graphs import DecodeGraphs
from alignpro.engine.plan_buffers import exact, padded
from alignpro.engine.pool import KVPool, Segment
from alignpro.engine.runner import Drawable, Drawn, LaunchedPass, add_drawn, draw, forward, settle
from alignpro.engine.scheduler import Batch, Chunk, Scheduler
from alignpro.engine.sequence import SampledSequence
from alignpro.engine.sequence_arrays import Ints
from alignpro.engine.static_plan import StaticPlans
from alignpro.engine.stats import EngineStats
from alignpro.models.language_model import LanguageModel

logger = logging.getLogger(__name__)

MAX_PLANS = 256
"""Maximum number of plans kept of decode batches without graphs."""


class Begun(NamedTuple):
    """A batch whose tokens have been drawn, but are not known to the host."""

    drawn: list[Drawn]
    whole: bool
    """Whether all its sequences have drawn. If not, others have their tokens already, or have failed."""


class Executor:
    """The forward passes and draws of a device.

    Args:
        models: Name → model.
        pool: Holds the keys and values.
        scheduler: Source of the batches; its token budget is reduced when memory runs out.
        graphs: If given, they run decode batches; the parts of a batch that has raised run without them.
    """

    def __init__(
        self,
        models: Mapping[str, LanguageModel],
        pool: KVPool,
        scheduler: Scheduler,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.models, self.pool, self.scheduler, self.graphs = models, pool, scheduler, graphs
        self._plans = StaticPlans(pool.device, MAX_PLANS, exact)
        self.max_tokens: int | None = None
        """Maximum number of tokens in a pass; None until memory has run out."""
        self._token_budget = scheduler.token_budget

    def start_run(self) -> None:
        """Forget how much memory there was: there may be more now."""
        self.max_tokens, self.scheduler.token_budget = None, self._token_budget

    @torch.no_grad()
    def begin(self, batch: Batch, stats: EngineStats, launched: LaunchedPass | None = None) -> Begun:
        """Compute a batch and draw tokens for its sequences, for which the host does not wait.

        Args:
            batch: The batch.
            stats: Counters to update.
            launched: Its forward pass, if that has been launched already.

        Raises:
            Exception: No sequence can be computed after this error (`faults.is_fatal`).
        """
        if launched is not None and not len(batch.to_sample):  # those that would have drawn were cancelled
            return Begun([], whole=True)
        drawable = launched.drawable() if launched is not None else self._compute(batch, stats)
        if drawable is None:
            return Begun([], whole=False)
        drawn = self._draw(rows := batch.to_sample, drawable, stats)
        return Begun(drawn, whole=sum(len(each.rows) for each in drawn) == len(rows))

    def _compute(self, batch: Batch, stats: EngineStats) -> Drawable | None:
        """Compute a batch; None if that took parts of it, whose sequences have drawn or failed."""
        room, table = self.max_tokens, self.scheduler.table
        if room is not None and batch.num_tokens > room:
            self._isolate(_split_to_size(batch.in_chunks(table), room), stats)
            return None
        decodes = len(batch.decoding) > 0
        graphs = self.graphs if decodes and (room is None or padded(len(batch.decoding)) <= room) else None
        outcome = self._forward(batch, stats, graphs)
        if not isinstance(outcome, Exception):
            return outcome
        # A pass without padding may not raise.
        self._isolate([batch.in_chunks(table)], stats, None if graphs else outcome)
        return None

    @torch.no_grad()
    def forward_ahead(self, batch: Batch, drawn: Sequence[Drawn], stats: EngineStats) -> Drawable:
        """Launch the pass of a batch, of whose next tokens those ``drawn`` are not known yet."""
        model, table = self.models[batch.model], self.scheduler.table
        return forward(model, self.pool, batch, stats, table, self._plans, self.graphs, drawn)

    @torch.no_grad()
    def finish(self, begun: Begun, stats: EngineStats) -> list[SampledSequence]:
        """Wait for the tokens of a batch and add them to its sequences. Returns the sequences that have ended or failed.

        Raises:
            Exception: No sequence can be computed after this error (`faults.is_fatal`).
        """
        ended = [sequence for drawn in begun.drawn for sequence in self._add(drawn, stats)]
        if begun.whole:
            return ended
        return [sequence for sequence in self.scheduler.running if sequence.completion is not None]

    def fail_batch(self, batch: Batch, error: Exception) -> list[SampledSequence]:
        """Fail all sequences of a batch after an error outside its passes and draws. Returns those that have ended."""
        logger.error("a batch of %s raised an exception", self.models[batch.model].name, exc_info=error)
        segments, drawing = {chunk.segment for chunk in batch.chunks}, set(batch.to_sample.tolist())
        for sequence in self.scheduler.running:
            if sequence.row in drawing or not segments.isdisjoint(_path(sequence)):
                sequence.fail(describe(f"a batch of {self.models[batch.model].name}", error))
        return [sequence for sequence in self.scheduler.running if sequence.completion is not None]

    def _forward(self, batch: Batch, stats: EngineStats, graphs: DecodeGraphs | None = None) -> Drawable | Exception:
        """What the sequences of a batch draw from, or the exception of its computation."""
        try:
            model, table = self.models[batch.model], self.scheduler.table
            return forward(model, self.pool, batch, stats, table, self._plans, graphs)
        except Exception as error:
            if is_fatal(error):
                raise
            return error

    def _try(self, part: Batch, stats: EngineStats) -> Exception | None:
        """Compute a part of a batch, and add the tokens that it draws. Returns the exception of the computation."""
        outcome = self._forward(part, stats)
        if isinstance(outcome, Exception):
            return outcome
        for drawn in self._draw(part.to_sample, outcome, stats):
            self._add(drawn, stats)
        return None

    def _isolate(self, parts: Sequence[Batch], stats: EngineStats, known: Exception | None = None) -> None:
        """Compute the parts of a batch one by one, halving those that raise; fail the sequences that need a bad chunk.

        Args:
            parts: The parts in order of dependency: prefixes come first.
            stats: Counters to update.
            known: The exception that the only part has raised, if it was computed already.
        """
        failed: set[Segment] = set()
        # The fewest tokens with which memory ran out, and the most tokens that were computed.
        too_many, enough = maxsize, 0
        reported = False
        waiting = list(reversed(parts))
        while waiting:
            part = _remaining(waiting.pop(), failed)
            tokens = part.num_tokens
            # If memory running out is the only error so far, a part as large as one that failed need not be tried.
            if not failed and enough < too_many <= tokens and (halves := _bisect(part, finer=True)):
                waiting += reversed(halves)
                continue
            error, known = (known, None) if known is not None else (self._try(part, stats), None)
            if error is None:
                enough = max(enough, tokens)
                continue
            finer = is_out_of_memory(error)
            if finer:
                too_many = min(too_many, tokens)
            elif not reported:
                name, reported = self.models[part.model].name, True
                logger.error("a forward pass of %s raised an exception: retrying it in parts", name, exc_info=error)
            error = error.with_traceback(None)  # the frames of the traceback hold the tensors of the pass
            if halves := _bisect(part, finer):
                waiting += reversed(halves)
            else:
                failed |= self._fail(part, error)
        if too_many < maxsize and not failed:
            self._limit_tokens(max(1, too_many // 2))

    def _fail(self, part: Batch, error: Exception) -> set[Segment]:
        """Fail the sequences that need a part that cannot be computed. Returns the segments that the part belongs to."""
        reason = describe(f"a forward pass of {self.models[part.model].name}", error)
        lost = {chunk.segment for chunk in part.chunks if chunk.write}
        # A segment that is already computed is needed only by the sequences that draw at its end.
        need = [s for s in self.scheduler.running if not lost.isdisjoint(_path(s))] if lost else part.drawing
        for sequence in need:
            sequence.fail(reason)
        logger.error("%d sequences have failed: %s", len(need), reason)
        return lost

    def _limit_tokens(self, tokens: int) -> None:
        """Limit later passes to ``tokens`` tokens."""
        if self.max_tokens is None:
            logger.warning("out of memory in a forward pass: from now on a pass computes at most %d tokens", tokens)
        self.max_tokens = tokens
        self.scheduler.token_budget = min(self.scheduler.token_budget, tokens)

    def _draw(self, rows: Ints, drawable: Drawable, stats: EngineStats) -> list[Drawn]:
        """Draw one token for each of B sequences; a sequence whose draw raises even alone fails."""
        table = self.scheduler.table
        if not len(rows):
            return []
        try:
            return draw(self.models, table, rows, drawable, stats)
        except Exception as error:
            if is_fatal(error):
                raise
            if len(rows) == 1:
                logger.exception("drawing a token raised an exception")
                for sequence in table.sequences(rows):
                    sequence.fail(describe("the draw of a token", error))
                return []
        halves = np.array_split(np.arange(len(rows)), 2)
        return [each for half in halves for each in self._draw(rows[half], drawable.at(half.tolist()), stats)]

    def _add(self, drawn: Drawn, stats: EngineStats) -> list[SampledSequence]:
        """Add drawn tokens to their sequences; a sequence for which that raises even alone fails.

        Returns the sequences that have ended or failed.
        """
        table, rows = self.scheduler.table, drawn.rows
        if not len(rows):
            return []
        before = table.counts(rows)
        try:
            return add_drawn(table, drawn, stats)
        except Exception as error:
            if is_fatal(error):
                raise
            # Some may have got theirs before the error.
            sequences = table.sequences(rows)
            have = [settle(each, count, drawn.model) for each, count in zip(sequences, before, strict=True)]
            waiting = np.flatnonzero(~np.array(have))
            if len(waiting) and len(rows) == 1:
                logger.exception("drawing a token raised an exception")
                sequences[0].fail(describe("the draw of a token", error))
                return sequences
        for half in np.array_split(waiting, 2):
            self._add(drawn.at(half), stats)
        return [sequence for sequence in sequences if sequence.completion is not None]


def _path(sequence: SampledSequence) -> set[Segment]:
    """The segments that a running sequence consists of."""
    assert sequence.node is not None and sequence.output is not None
    return {*sequence.node.path(), sequence.output}


def _remaining(part: Batch, failed: set[Segment]) -> Batch:
    """A part without the chunks that depend on segments that could not be computed, and without ended sequences."""
    chunks = [chunk for chunk in part.chunks if failed.isdisjoint(chunk.path)]
    return replace(part, chunks=chunks, drawing=[s for s in part.drawing if s.completion is None])


def _bisect(batch: Batch, finer: bool) -> list[Batch]:
    """Two halves of a batch; a single chunk is halved only if ``finer``. Empty if the batch cannot be split."""
    chunks, middle = batch.chunks, len(batch.chunks) // 2
    if len(chunks) > 1:
        return _partition(batch, [chunks[:middle], chunks[middle:]])
    if chunks and finer and chunks[0].count > 1:
        (chunk,) = chunks
        first = replace(chunk, count=chunk.count // 2)
        return _partition(batch, [[first], [replace(chunk, first=first.end, count=chunk.count - first.count)]])
    return _partition(batch, [chunks]) if chunks and len(batch.drawing) > len(_sampling_at(batch, chunks)) else []


def _split_to_size(batch: Batch, max_tokens: int) -> list[Batch]:
    """Split a batch into parts of at most ``max_tokens`` tokens; a chunk that is larger is a part by itself."""
    groups: list[list[Chunk]] = []
    for chunk in batch.chunks:
        if groups and sum(each.count for each in groups[-1]) + chunk.count <= max_tokens:
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return _partition(batch, groups)


def _partition(batch: Batch, groups: Sequence[list[Chunk]]) -> list[Batch]:
    """One batch per group of chunks, preceded by a batch without chunks for the sequences whose end states are known."""
    parts = [replace(batch, chunks=chunks, drawing=_sampling_at(batch, chunks)) for chunks in groups]
    waiting = {sequence for part in parts for sequence in part.drawing}
    known = [sequence for sequence in batch.drawing if sequence not in waiting]
    return ([replace(batch, chunks=[], drawing=known)] if known else []) + parts


def _sampling_at(batch: Batch, chunks: Sequence[Chunk]) -> list[SampledSequence]:
    """The sequences of a batch that can draw once the given chunks are computed."""
    ends = {chunk.segment for chunk in chunks if chunk.end == len(chunk.segment.tokens)}
    return [sequence for sequence in batch.drawing if sequence.last_segment in ends]
