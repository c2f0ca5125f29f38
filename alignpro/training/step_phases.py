"""The phases of a step: each is timed, announced to the other ranks, and finds the weights that it needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from alignpro.distributed.ranks import Ranks
from alignpro.training.metrics import Metrics

Context = Callable[[], AbstractContextManager[object]]


class StepPhases:
    """Context managers of the phases of a step: ``with phase("rollout"): …``.

    Args:
        ranks: The other ranks, which are told the phase, so that an error elsewhere can say where this rank is.
        contexts: Phase → the contexts that surround it, outermost first: those that gather or load weights, and those that
            make ranks agree on errors.
    """

    def __init__(self, ranks: Ranks, contexts: Mapping[str, Sequence[Context]]) -> None:
        self._ranks, self._contexts = ranks, contexts
        self._label = ""
        self.seconds: Metrics = {}
        """``seconds/<phase>`` of the current step."""

    def begin(self, label: str) -> None:
        """Begin a step, whose phases are announced under a label."""
        self._label, self.seconds = label, {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Run a phase inside its contexts."""
        self._ranks.enter_phase(f"{self._label}, {phase}")
        started = time.perf_counter()
        try:
            with ExitStack() as stack:
                for context in self._contexts[phase]:
                    stack.enter_context(context())
                yield
        finally:
            key = f"seconds/{phase}"
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - started
