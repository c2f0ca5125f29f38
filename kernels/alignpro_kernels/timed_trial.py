"""Which of several implementations of one computation is used: the one that a short trial on the device measured fastest.

The first is the one that always runs. Another one must agree with it and be faster by `MARGIN`, so that noise does not
choose. An implementation that raises or disagrees is not used, which is a warning.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger("alignpro_kernels")

MARGIN = 1.05
"""By how much another implementation must be faster than the one that always runs."""
_WARM_UPS = 2
_REPEATS = 5
_TOLERANCE = 1 / 32
"""The largest difference, relative to the largest value, that counts as agreement: some roundings of bfloat16."""


@dataclass(frozen=True)
class Choice:
    """The result of a trial."""

    name: str
    """The implementation to use."""
    seconds: Mapping[str, float]
    """The shortest time of each implementation that works, in seconds."""
    reasons: Mapping[str, str]
    """Why the others are not used."""

    def __str__(self) -> str:
        """Say what is used, and what was measured."""
        times = [f"{name} {1e3 * taken:.3f} ms" for name, taken in sorted(self.seconds.items(), key=lambda x: x[1])]
        failed = [f"{name} cannot run: {reason}" for name, reason in self.reasons.items()]
        return f"{self.name} ({'; '.join([*times, *failed])})"


def choose(
    trials: Mapping[str, Callable[[], Sequence[Tensor]]],
    *,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """Run each implementation a few times and return the one to use.

    Args:
        trials: Name → a function that runs the implementation on the same input and returns its results. What the first
            one raises is raised.
        synchronize: Waits until the device has done all work.
        clock: The time in seconds.

    Raises:
        torch.AcceleratorError: An implementation has left the device in an unusable state.
    """
    (first, baseline), *others = trials.items()
    expected = baseline()
    seconds = {first: _seconds(baseline, synchronize, clock)}
    reasons: dict[str, str] = {}
    for name, trial in others:
        try:
            if (reason := _difference(trial(), expected)) is None:
                seconds[name] = _seconds(trial, synchronize, clock)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # each library raises errors of its own kinds; all of them are reported
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if reason is not None:
            reasons[name] = reason
            logger.warning("%s is not used: %s", name, reason)
    best = min(seconds, key=lambda name: seconds[name] * (1.0 if name == first else MARGIN))
    return Choice(best, seconds, reasons)


def _seconds(trial: Callable[[], object], synchronize: Callable[[], None], clock: Callable[[], float]) -> float:
    """The shortest time of a few runs, after some that compile and load what is needed."""
    for _ in range(_WARM_UPS):
        trial()
    taken = []
    for _ in range(_REPEATS):
        synchronize()
        start = clock()
        trial()
        synchronize()
        taken.append(clock() - start)
    return min(taken)


def _difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """How results differ from the expected ones; None if only by rounding."""
    for i, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
        bound = _TOLERANCE * float(theirs.abs().max())
        error = float((ours.float() - theirs.float()).abs().max())
        if not error <= bound:  # also true for NaN
            return f"its result {i} differs by {error:.3g}, and at most {bound:.3g} would be rounding"
    return None
