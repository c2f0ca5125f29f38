"""The components that wait: they wait at the same time, and may begin with some responses before the others are there.

What is begun is kept until `WaitingComponents.start` asks for the same row. A component's result for a row depends on nothing but
this row, if it is asked by rows; so it does not matter what was begun, nor in which order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from functools import partial

from alignpro.data import Prompt
from alignpro.rewards.component import ConcurrentReward, Measurement, guarded_await
from alignpro.rewards.event_loop import EventLoopThread

_Row = tuple[int, str, str | None]
"""The identity of the prompt, the response, the rewrite."""


@dataclass(frozen=True)
class _Place:
    """Where the measurement of a row is: in the result of a component that measures some rows together."""

    measured: Future[Measurement]
    index: int


@dataclass(frozen=True)
class _Begun:
    """A row that was begun."""

    prompt: Prompt
    """Kept, so that no other prompt gets its identity."""
    places: Mapping[str, _Place]
    """By component."""


class StartedMeasurements:
    """The measurements of N rows, by component; what was begun before is among them.

    Args:
        places: Component → [N].
    """

    def __init__(self, places: Mapping[str, Sequence[_Place]]) -> None:
        self._places = places

    def results(self) -> dict[str, Measurement]:
        """Wait for all; of several errors, the first in the order of components and rows is raised."""
        parts = {what: dict.fromkeys(place.measured for place in each) for what, each in self._places.items()}
        futures = [future for each in parts.values() for future in each]
        ended = wait(futures, return_when=FIRST_EXCEPTION).done
        for future in futures:
            if future in ended:
                future.result()
        return {what: _joined(places) for what, places in self._places.items()}

    def cancel(self) -> None:
        """Cancel what has not ended."""
        for places in self._places.values():
            for place in places:
                place.measured.cancel()


class WaitingComponents:
    """Components that wait, on an event loop of their own. Its methods may be called from any thread.

    Args:
        components: The name in messages → the component, in their order.
    """

    def __init__(self, components: Mapping[str, ConcurrentReward]) -> None:
        self._components = dict(components)
        self._by_row = {what: each for what, each in components.items() if each.by_row}
        self._loop = EventLoopThread()
        self._lock = threading.Lock()  # of what follows
        self._begun: dict[_Row, deque[_Begun]] = {}

    @property
    def begin_early(self) -> bool:
        """Whether any of them can begin before all rows are there."""
        return bool(self._by_row)

    def begin(self, prompt: Prompt, responses: Sequence[str], rewrite: str | None) -> None:
        """Let the components that are asked by rows begin with the responses to one rewrite, or to one prompt."""
        if not responses or not self._by_row:
            return
        prompts = [prompt] * len(responses)
        rewrites = None if rewrite is None else [rewrite] * len(responses)
        measured = {what: self._submit(what, prompts, responses, rewrites) for what in self._by_row}
        with self._lock:
            for i, response in enumerate(responses):
                places = {what: _Place(future, i) for what, future in measured.items()}
                self._begun.setdefault((id(prompt), response, rewrite), deque()).append(_Begun(prompt, places))

    def start(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rewrites: Sequence[str] | None
    ) -> StartedMeasurements:
        """Begin with what has not begun yet."""
        of_rows: Sequence[str | None] = rewrites if rewrites is not None else [None] * len(prompts)
        rows = [(id(prompt), y, rewrite) for prompt, y, rewrite in zip(prompts, responses, of_rows, strict=True)]
        begun = [self._take(row) for row in rows]
        places: dict[str, list[_Place]] = {}
        for what in self._components:
            mine = [None if each is None else each.places.get(what) for each in begun]
            rest = [i for i, place in enumerate(mine) if place is None]
            if rest:
                measured = self._submit(
                    what,
                    [prompts[i] for i in rest],
                    [responses[i] for i in rest],
                    None if rewrites is None else [rewrites[i] for i in rest],
                )
                for index, i in enumerate(rest):
                    mine[i] = _Place(measured, index)
            places[what] = [place for place in mine if place is not None]
        return StartedMeasurements(places)

    def forget(self) -> None:
        """Cancel what was begun and will not be asked for."""
        with self._lock:
            begun, self._begun = self._begun, {}
        for each in begun.values():
            for row in each:
                for place in row.places.values():
                    place.measured.cancel()

    def _take(self, row: _Row) -> _Begun | None:
        with self._lock:
            begun = self._begun.get(row)
            if begun is None:
                return None
            first = begun.popleft()
            if not begun:
                del self._begun[row]
            return first

    def _submit(
        self, what: str, prompts: Sequence[Prompt], responses: Sequence[str], rewrites: Sequence[str] | None
    ) -> Future[Measurement]:
        measure = partial(self._components[what].measure, prompts, responses, rewrites)
        return self._loop.submit(guarded_await(what, prompts, measure))


def _joined(places: Sequence[_Place]) -> Measurement:
    """The measurement of each row, from those of its part."""
    parts = [(place.measured.result(), place.index) for place in places]
    return Measurement(
        [part.values[i] for part, i in parts],
        {name: [part.metrics[name][i] for part, i in parts] for name in parts[0][0].metrics},
    )
