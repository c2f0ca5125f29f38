"""The phases of a step: each is timed, announced to the other ranks, and finds the weights that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from alignpro.distributed.ranks import Ranks
from alignpro.training.metrics import Metrics, PhaseTimer

Context = Callable[[], AbstractContextManager[object]]


class StepPhases:
    """Context managers of the phases of a step: ``with phase("rollout"): …``.

    Args:
        ranks: The other ranks, which are told the phase, so that an error elsewhere can say where this rank is.
        contexts: Phase → the contexts that surround it, outermost first: those that gather or load weights, and those that
            make ranks agree on errors.
    """

    def __init__(self, ranks: Ranks, contexts: Mapping[str, Sequence[Context]]) -> None:
        self._ranks, self._contexts, self._timer = ranks, contexts, PhaseTimer()

    def begin(self, label: str) -> None:
        """Begin a step, whose phases are announced under a label."""
        self._timer = PhaseTimer(lambda phase: self._ranks.enter_phase(f"{label}, {phase}"))

    @property
    def seconds(self) -> Metrics:
        """``seconds/<phase>`` of the current step."""
        return self._timer.seconds

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Run a phase inside its contexts."""
        with self._timer(phase), ExitStack() as stack:
            for context in self._contexts[phase]:
                stack.enter_context(context())
            yield
