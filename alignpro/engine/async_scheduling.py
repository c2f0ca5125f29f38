"""Asynchronous scheduling: the host plans and launches the next forward pass before it knows the tokens of this one.

A GPU would otherwise have nothing to do between a draw and the next pass, while the host waits for the tokens, looks for
ends and plans. So once the draw of a step has been launched, the next pass is launched behind it, into which the drawn
tokens go on the device. Only then does the host wait for the tokens. The draw after that pass is launched by the next step,
when the host knows who goes on. So between steps everything is as it would be without this, except that a pass has been
launched that the next step would launch.

A sequence that turns out to have ended, or is cancelled, has been computed in vain: its state is never drawn from. Its place
is taken by a waiting one a step later. Its pages are freed at once. Whatever uses them next is launched later on the same
stream, so it runs after that pass: a pass that writes them, pages that are copied or moved where a node of the prefix tree
is made or split, the copy of an arena that grows. Memory that is unmapped (`arena.FixedArena`) waits for the device. Chunks
of prompts count as computed once their pass has been launched, as ever. When nobody goes on, the host waits for the pass, so
no work is left on the device when nothing is pending: weights may change, move and be freed, and `Engine.release` may be
called.

| owns | does not own |
|---|---|
| the pass that has been launched, when one is, who is in vain | what is in it (`scheduler`), how it runs (`fault_isolation`) |
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from alignpro.engine.fault_isolation import Executor
from alignpro.engine.faults import is_fatal, is_out_of_memory
from alignpro.engine.runner import Drawn, LaunchedPass
from alignpro.engine.scheduler import Batch, Scheduler
from alignpro.engine.sequence_arrays import Ints
from alignpro.engine.stats import EngineStats

logger = logging.getLogger(__name__)


class AsyncScheduling:
    """The pass that a device computes ahead.

    Args:
        scheduler: Source of the batches.
        executor: Runs them.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self.scheduler, self._executor = scheduler, executor
        self._launched: LaunchedPass | None = None
        self._decoding: Ints | None = None  # of its model when it was launched: see `Scheduler.decoding`
        self._out_of_memory = False  # in this run

    @property
    def has_pass(self) -> bool:
        """Whether a pass has been launched for the next step."""
        return self._launched is not None

    def start_run(self) -> None:
        """Forget that memory ran out: there may be more now."""
        self._out_of_memory = False

    def clear(self) -> None:
        """Forget the pass, whatever state an interrupt left."""
        self._launched = None

    def launch(self, batch: Batch, drawn: Sequence[Drawn], stats: EngineStats) -> None:
        """Launch the pass after that of a batch all whose tokens have been drawn, if it can be known already.

        A pass that raises is forgotten: the next step computes it with all that isolates faults.

        Raises:
            Exception: Nothing can be computed after this error (`faults.is_fatal`), or pages could not be allocated.
        """
        if self._out_of_memory or self._executor.max_tokens is not None:
            return
        table = self.scheduler.table
        rows = drawn[0].rows if len(drawn) == 1 else np.concatenate([each.rows for each in drawn])
        ends = table.ends_with_next(rows)
        going_on = rows[~ends]
        table.presume(going_on, 1)
        try:
            graphs = self._executor.graphs
            apart = [name for name in self.scheduler.models if graphs is not None and graphs.runs(name)]
            following = self.scheduler.schedule_ahead(batch, rows[ends], apart)
            if following is not None:
                self._launch(following, drawn, stats)
        finally:
            table.presume(going_on, -1)

    def _launch(self, batch: Batch, drawn: Sequence[Drawn], stats: EngineStats) -> None:
        try:
            states = self._executor.forward_ahead(batch, drawn, stats)
        except Exception as error:
            if is_fatal(error):
                raise
            self._out_of_memory = is_out_of_memory(error)
            logger.warning(
                "a forward pass that was launched ahead raised an exception: computing it anew", exc_info=error
            )
        else:
            self._decoding = self.scheduler.decoding(batch.model)
            self._launched = LaunchedPass(batch, states)

    def take(self, stats: EngineStats) -> LaunchedPass | None:
        """The pass that has been launched, for those of its sequences that go on; None if there is none."""
        launched, self._launched = self._launched, None
        if launched is None:
            return None
        batch, decoding, drawing = launched.batch, *self._going_on(launched.batch)
        stats.computed["decode"] += len(decoding)
        if (wasted := len(batch.decoding) - len(decoding)) == 0 and len(drawing) == len(batch.drawing):
            return launched
        stats.computed["wasted"] += wasted
        at = [*decoding.tolist(), *(len(batch.decoding) + place for place in drawing)]
        going_on = replace(
            batch, decoding=batch.decoding[decoding], drawing=[batch.drawing[place] for place in drawing]
        )
        return LaunchedPass(going_on, launched.states, at)

    def drop_if_needless(self, stats: EngineStats) -> None:
        """If nobody needs the pass, wait for it and forget it."""
        if self._launched is None:
            return
        batch, states = self._launched.batch, self._launched.states.states
        decoding, drawing = self._going_on(batch)
        if (len(decoding) or drawing or batch.chunks) and not self.scheduler.idle:
            return
        stats.computed["wasted"] += len(batch.decoding)
        self._launched = None
        if states.device.type != "cpu":
            torch.accelerator.current_stream(states.device).synchronize()

    def _going_on(self, batch: Batch) -> tuple[Ints, list[int]]:
        """The places, among those that decode and those that draw otherwise, of those that go on in the batch launched."""
        drawing = [place for place, sequence in enumerate(batch.drawing) if sequence.completion is None]
        decoding = self.scheduler.decoding(batch.model)
        if decoding is self._decoding:
            return np.arange(len(batch.decoding)), drawing
        return np.flatnonzero(np.isin(batch.decoding, decoding)), drawing
