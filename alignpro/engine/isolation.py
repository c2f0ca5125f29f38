"""Ticks carried out such that what raises fails alone.

What a sequence draws does not depend on what it is computed with, so a tick may be computed in any parts. One that
raises is halved until items are found that raise by themselves: the sequences which need those have failed, all others go
on as if nothing had been. One such item among N costs about 2 · log₂ N passes; a tick that does not raise costs nothing.
Where memory runs out, items are halved too, and later passes are as small as had to be.

| owns | does not own |
|---|---|
| which part of a tick raises, how many tokens memory allows in a pass | passes themselves, pages, what a failure leads to |

Tokens count as computed once their pass has succeeded (`runner.compute`), so nobody reads what a broken one has written.
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
from alignpro.language_model import LanguageModel

logger = logging.getLogger(__name__)


class Passes:
    """The forward passes and draws of one run.

    Args:
        models: By name.
        pool: Where keys and values are.
        scheduler: Where ticks come from; its budget shrinks to what memory allows.
        stats: What is counted.
        graphs: They run ticks of next tokens alone, if given; parts of a tick that has raised are run without.
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
        """Tokens in a pass, once memory has run out with more."""

    def carry_out(self, tick: Tick) -> list[SampledSequence]:
        """Compute a tick and let its sequences draw; those that have ended then, or have failed.

        Raises:
            Exception: One after which no sequence can be computed (`faults.ends_run`).
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
        """Compute a tick and draw; what the computing has raised, if it has."""
        try:
            states = compute(self.models[tick.model], self.pool, tick, self.stats, graphs)
        except Exception as error:
            if ends_run(error):
                raise
            return error
        self._draw(tick.drawing, states)
        return None

    def _apart(self, parts: Sequence[Tick], known: Exception | None = None) -> None:
        """Compute the parts of a tick one after the other, halving those that raise; fail those whom a lone item belongs to.

        Args:
            parts: In order: what tokens go on from comes first.
            known: What the only part has raised, if it was computed before.
        """
        failed: set[Segment] = set()
        too_many, enough = maxsize, 0  # the fewest tokens with which memory ran out, the most that were computed
        reported = False
        waiting = list(reversed(parts))
        while waiting:
            part = _remaining(waiting.pop(), failed)
            tokens = _tokens(part)
            # Where all errors are those of a device that is too small, the next part as large need not be tried.
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
                logger.error("a forward pass of %s raised: it is made in parts", name, exc_info=error)
            error = error.with_traceback(None)  # whose frames hold the tensors of the pass
            if halves := _halves(part, finer):
                waiting += reversed(halves)
            else:
                failed |= self._fail(part, error)
        if too_many < maxsize and not failed:
            self._narrow(max(1, too_many // 2))

    def _fail(self, part: Tick, error: Exception) -> set[Segment]:
        """Fail the sequences that need what cannot be computed; returns the segments that it is part of."""
        reason = described(f"a forward pass of {self.models[part.model].name}", error)
        lost = {item.segment for item in part.items if item.write}
        # A segment that is there already is needed only by those who draw at its end.
        need = [s for s in self.scheduler.running if not lost.isdisjoint(_path(s))] if lost else part.drawing
        for sequence in need:
            sequence.fail(reason)
        logger.error("%d sequences have failed: %s", len(need), reason)
        return lost

    def _narrow(self, tokens: int) -> None:
        """Compute no more than so many tokens at once from now on."""
        if self.most is None:
            logger.warning("memory has run out in a forward pass: from now on at most %d tokens are in one", tokens)
        self.most = tokens
        self.scheduler.token_budget = min(self.scheduler.token_budget, tokens)

    def _draw(self, sequences: Sequence[SampledSequence], states: Tensor) -> None:
        """Draw a token each from (B, D) states; a sequence whose draw raises even alone has failed."""
        try:
            draw(self.models, sequences, states, self.stats)
            return
        except Exception as error:
            if ends_run(error):
                raise
            if len(sequences) == 1:
                logger.exception("the draw of a token raised")
                sequences[0].fail(described("the draw of a token", error))
                return
        # Some that are drawn in other ways may have drawn before it raised: their last token is not computed.
        rows = [row for row, s in enumerate(sequences) if s.completion is None and s.own is not None and s.own.complete]
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            if half:
                self._draw([sequences[row] for row in half], states[half])


def _tokens(tick: Tick) -> int:
    return sum(item.count for item in tick.items)


def _path(sequence: SampledSequence) -> set[Segment]:
    """All that a running sequence goes through."""
    assert sequence.node is not None and sequence.own is not None
    return {*sequence.node.path(), sequence.own}


def _end(sequence: SampledSequence) -> Segment:
    """What a sequence that has not drawn yet draws at the end of."""
    end = sequence.own if sequence.drawn else sequence.node
    assert end is not None
    return end


def _remaining(part: Tick, failed: set[Segment]) -> Tick:
    """What of a part does not go on from segments that could not be computed."""
    items = [item for item in part.items if failed.isdisjoint(item.path)]
    return replace(part, items=items, drawing=[s for s in part.drawing if s.completion is None])


def _halves(tick: Tick, finer: bool) -> list[Tick]:
    """Two halves of a tick, of a lone item if it may be ``finer``; none where there is nothing to part."""
    items, middle = tick.items, len(tick.items) // 2
    if len(items) > 1:
        return _parted(tick, [items[:middle], items[middle:]])
    if items and finer and items[0].count > 1:
        (item,) = items
        first = replace(item, count=item.count // 2)
        return _parted(tick, [[first], [replace(item, first=first.end, count=item.count - first.count)]])
    return _parted(tick, [items]) if items and len(tick.drawing) > len(_drawing_at(tick, items)) else []


def _pieces(tick: Tick, most: int) -> list[Tick]:
    """A tick in parts of no more than so many tokens, or of one item."""
    groups: list[list[Item]] = []
    for item in tick.items:
        if groups and sum(each.count for each in groups[-1]) + item.count <= most:
            groups[-1].append(item)
        else:
            groups.append([item])
    return _parted(tick, groups)


def _parted(tick: Tick, groups: Sequence[list[Item]]) -> list[Tick]:
    """The ticks of some items each; before them one of the sequences that draw at ends which are known."""
    parts = [replace(tick, items=items, drawing=_drawing_at(tick, items)) for items in groups]
    waiting = {sequence for part in parts for sequence in part.drawing}
    known = [sequence for sequence in tick.drawing if sequence not in waiting]
    return ([replace(tick, items=[], drawing=known)] if known else []) + parts


def _drawing_at(tick: Tick, items: Sequence[Item]) -> list[SampledSequence]:
    """The sequences that can draw once some items are computed."""
    ends = {item.segment for item in items if item.end == len(item.segment.tokens)}
    return [sequence for sequence in tick.drawing if _end(sequence) in ends]
