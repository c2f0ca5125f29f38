"""Execute ticks so that a failure is confined to the sequences that cause it.

The tokens that a sequence draws do not depend on what it is batched with, so a tick may be split in any way. A tick that
raises is halved until the items are found that raise by themselves. The sequences that need those items fail; all others
continue unaffected. One such item among N costs about 2 · log₂ N passes; a tick that does not raise costs nothing extra.
If memory runs out, single items are halved too, and later passes are limited to a size that fits.

| owns | does not own |
|---|---|
| which part of a tick raises, how many tokens fit in a pass | the passes themselves, pages, follow-ups of a failure |

Tokens count as computed only after their pass has succeeded (`runner.compute`), so data written by a failed pass is never
read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from sys import maxsize

from torch import Tensor

from alignpro.engine.faults import described, ends_run, out_of_memory
from alignpro.engine.graphs import DecodeGraphs
from alignpro.engine.pool import KVPool, Segment
from alignpro.engine.runner import compute, draw
from alignpro.engine.scheduler import Item, Scheduler, Tick
from alignpro.engine.sequence import SampledSequence
from alignpro.engine.types import EngineStats
from alignpro.models.language_model import LanguageModel

logger = logging.getLogger(__name__)


class Passes:
    """The forward passes and draws of one run.

    Args:
        models: Name → model.
        pool: Holds the keys and values.
        scheduler: Source of the ticks; its token budget is reduced when memory runs out.
        stats: Counters to update.
        graphs: If given, they run decode ticks; the parts of a tick that has raised run without them.
    """

    def __init__(
        self,
        models: Mapping[str, LanguageModel],
        pool: KVPool,
        scheduler: Scheduler,
        stats: EngineStats,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.models, self.pool, self.scheduler, self.stats, self.graphs = models, pool, scheduler, stats, graphs
        self.most: int | None = None
        """Maximum number of tokens in a pass; None until memory has run out."""

    def carry_out(self, tick: Tick) -> list[SampledSequence]:
        """Compute a tick and draw tokens for its sequences. Returns the sequences that have ended or failed.

        Raises:
            Exception: No sequence can be computed after this error (`faults.ends_run`).
        """
        if self.most is None or _tokens(tick) <= self.most:
            error = self._attempt(tick, self.graphs)
            if error is None:
                return [sequence for sequence in tick.drawing if sequence.completion is not None]
            self._apart([tick], error)
        else:
            self._apart(_pieces(tick, self.most))
        return [sequence for sequence in self.scheduler.running if sequence.completion is not None]

    def _attempt(self, tick: Tick, graphs: DecodeGraphs | None = None) -> Exception | None:
        """Compute a tick and draw. Returns the exception that the computation raised, if any."""
        try:
            states = compute(self.models[tick.model], self.pool, tick, self.stats, graphs)
        except Exception as error:
            if ends_run(error):
                raise
            return error
        self._draw(tick.drawing, states)
        return None

    def _apart(self, parts: Sequence[Tick], known: Exception | None = None) -> None:
        """Compute the parts of a tick one by one, halving those that raise; fail the sequences that need a single bad item.

        Args:
            parts: The parts in order of dependency: prefixes come first.
            known: The exception that the only part has raised, if it was computed already.
        """
        failed: set[Segment] = set()
        # The fewest tokens with which memory ran out, and the most tokens that were computed.
        too_many, enough = maxsize, 0
        reported = False
        waiting = list(reversed(parts))
        while waiting:
            part = _remaining(waiting.pop(), failed)
            tokens = _tokens(part)
            # If memory running out is the only error so far, a part as large as one that failed need not be tried.
            if not failed and enough < too_many <= tokens and (halves := _halves(part, finer=True)):
                waiting += reversed(halves)
                continue
            error, known = (known, None) if known is not None else (self._attempt(part), None)
            if error is None:
                enough = max(enough, tokens)
                continue
            finer = out_of_memory(error)
            if finer:
                too_many = min(too_many, tokens)
            elif not reported:
                name, reported = self.models[part.model].name, True
                logger.error("a forward pass of %s raised an exception: retrying it in parts", name, exc_info=error)
            error = error.with_traceback(None)  # the frames of the traceback hold the tensors of the pass
            if halves := _halves(part, finer):
                waiting += reversed(halves)
            else:
                failed |= self._fail(part, error)
        if too_many < maxsize and not failed:
            self._narrow(max(1, too_many // 2))

    def _fail(self, part: Tick, error: Exception) -> set[Segment]:
        """Fail the sequences that need a part that cannot be computed. Returns the segments that the part belongs to."""
        reason = described(f"a forward pass of {self.models[part.model].name}", error)
        lost = {item.segment for item in part.items if item.write}
        # A segment that is already computed is needed only by the sequences that draw at its end.
        need = [s for s in self.scheduler.running if not lost.isdisjoint(_path(s))] if lost else part.drawing
        for sequence in need:
            sequence.fail(reason)
        logger.error("%d sequences have failed: %s", len(need), reason)
        return lost

    def _narrow(self, tokens: int) -> None:
        """Limit later passes to ``tokens`` tokens."""
        if self.most is None:
            logger.warning("out of memory in a forward pass: from now on a pass computes at most %d tokens", tokens)
        self.most = tokens
        self.scheduler.token_budget = min(self.scheduler.token_budget, tokens)

    def _draw(self, sequences: Sequence[SampledSequence], states: Tensor) -> None:
        """Draw one token per sequence from (B, D) states; a sequence whose draw raises even alone fails."""
        try:
            draw(self.models, sequences, states, self.stats)
            return
        except Exception as error:
            if ends_run(error):
                raise
            if len(sequences) == 1:
                logger.exception("drawing a token raised an exception")
                sequences[0].fail(described("the draw of a token", error))
                return
        # Sequences with other sampling parameters may have drawn before the error. Their last token is not computed yet,
        # which tells them apart.
        rows = [row for row, s in enumerate(sequences) if s.completion is None and s.own is not None and s.own.complete]
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            if half:
                self._draw([sequences[row] for row in half], states[half])


def _tokens(tick: Tick) -> int:
    return sum(item.count for item in tick.items)


def _path(sequence: SampledSequence) -> set[Segment]:
    """The segments that a running sequence consists of."""
    assert sequence.node is not None and sequence.own is not None
    return {*sequence.node.path(), sequence.own}


def _end(sequence: SampledSequence) -> Segment:
    """The segment at whose end a sequence draws its next token."""
    end = sequence.own if sequence.drawn else sequence.node
    assert end is not None
    return end


def _remaining(part: Tick, failed: set[Segment]) -> Tick:
    """A part without the items that depend on segments that could not be computed, and without ended sequences."""
    items = [item for item in part.items if failed.isdisjoint(item.path)]
    return replace(part, items=items, drawing=[s for s in part.drawing if s.completion is None])


def _halves(tick: Tick, finer: bool) -> list[Tick]:
    """Two halves of a tick; a single item is halved only if ``finer``. Empty if the tick cannot be split."""
    items, middle = tick.items, len(tick.items) // 2
    if len(items) > 1:
        return _parted(tick, [items[:middle], items[middle:]])
    if items and finer and items[0].count > 1:
        (item,) = items
        first = replace(item, count=item.count // 2)
        return _parted(tick, [[first], [replace(item, first=first.end, count=item.count - first.count)]])
    return _parted(tick, [items]) if items and len(tick.drawing) > len(_drawing_at(tick, items)) else []


def _pieces(tick: Tick, most: int) -> list[Tick]:
    """Split a tick into parts of at most ``most`` tokens; an item that is larger is a part by itself."""
    groups: list[list[Item]] = []
    for item in tick.items:
        if groups and sum(each.count for each in groups[-1]) + item.count <= most:
            groups[-1].append(item)
        else:
            groups.append([item])
    return _parted(tick, groups)


def _parted(tick: Tick, groups: Sequence[list[Item]]) -> list[Tick]:
    """One tick per group of items, preceded by a tick without items for the sequences whose end states are known."""
    parts = [replace(tick, items=items, drawing=_drawing_at(tick, items)) for items in groups]
    waiting = {sequence for part in parts for sequence in part.drawing}
    known = [sequence for sequence in tick.drawing if sequence not in waiting]
    return ([replace(tick, items=[], drawing=known)] if known else []) + parts


def _drawing_at(tick: Tick, items: Sequence[Item]) -> list[SampledSequence]:
    """The sequences of a tick that can draw once the given items are computed."""
    ends = {item.segment for item in items if item.end == len(item.segment.tokens)}
    return [sequence for sequence in tick.drawing if _end(sequence) in ends]
