"""Which checkpoint a run exports: its last, or one with a better held-out estimate of the objective (``run.select``).

The prompts by which it is selected are `data.validation`'s, which are neither trained on nor reported by `alignpro eval`: the
largest of several noisy estimates is too high on the prompts that it was chosen by. For the same reason the last checkpoint,
which has learned from the most samples, is given up for the best one only if it is worse on the same prompts by more than the
standard error of that difference: the rule of one standard error (Breiman et al., 1984, Classification and Regression Trees,
section 3.4.3), on paired differences.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluated:
    """The estimate of J after a step."""

    step: int
    objective: float
    error: float | None
    """Its standard error; None for a single prompt."""

    def __str__(self) -> str:
        return f"step {self.step}: J {_with_error(self.objective, self.error)}"


class Selection:
    """The best evaluation so far, and the last one. Its state is part of checkpoints.

    Args:
        active: Whether a checkpoint is selected; else this selects nothing.
    """

    def __init__(self, active: bool) -> None:
        self.active = active
        self.best: Evaluated | None = None
        self.last: Evaluated | None = None
        self._best_objective: Sequence[float] = ()
        """J of each prompt, of the best evaluation."""
        self._worse: tuple[float, float | None] = 0.0, None
        """Mean and standard error of J of the best minus J of the last, over prompts."""

    def add(self, step: int, objective: Sequence[float]) -> None:
        """Add the evaluation after a step.

        Args:
            step: Number of steps made.
            objective: J of each prompt, the same prompts each time; without one, or with one that is no number, there is
                nothing to compare.
        """
        if not self.active or not objective or not all(map(math.isfinite, objective)):
            return
        if self.best is not None and len(objective) != len(self._best_objective):
            logger.warning(
                "run.eval_prompts has changed: the best checkpoint so far, of step %d, was evaluated on %d validation prompts "
                "instead of %d, and is not compared with later ones",
                self.best.step,
                len(self._best_objective),
                len(objective),
            )
            self.reset()
        self.last = Evaluated(step, *_mean_and_error(objective))
        if self.best is None or self.last.objective > self.best.objective:
            self.best, self._best_objective = self.last, objective
        self._worse = _mean_and_error([a - b for a, b in zip(self._best_objective, objective, strict=True)])

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation."""
        return None if self.best is None else self.best.step

    @property
    def selected_step(self) -> int | None:
        """The step that is exported: that of the last evaluation, unless the best is better by more than the noise."""
        if self.best is None or self.last is None:
            return None
        worse, error = self._worse
        return self.last.step if worse <= (error or 0.0) else self.best.step

    def reset(self) -> None:
        """Forget all evaluations."""
        self.best = self.last = None

    def record(self) -> dict[str, Any]:
        """Return what the exported model's record says; empty without evaluations."""
        if self.best is None or self.last is None:
            return {}
        record = {"step": self.selected_step, "best": asdict(self.best), "last": asdict(self.last)}
        return record | {"best_minus_last": dict(zip(("objective", "error"), self._worse, strict=True))}

    def state_dict(self) -> dict[str, Any]:
        """Return the state to checkpoint; empty without evaluations."""
        if self.best is None or self.last is None:
            return {}
        own = {"best_objective": list(self._best_objective), "worse": list(self._worse)}
        return {"best": asdict(self.best), "last": asdict(self.last), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Runs of earlier versions did not save J of each prompt: their past is forgotten."""
        if self.active and "best_objective" in state:
            self.best, self.last = (Evaluated(**state[each]) for each in ("best", "last"))
            self._best_objective, self._worse = state["best_objective"], tuple(state["worse"])

    def __str__(self) -> str:
        step = self.selected_step
        kept = "the last" if self.last is not None and step == self.last.step else "the best"
        return (
            f"the model is {kept}, of step {step}; best {self.best}; last {self.last}; the best is better by "
            f"{_with_error(*self._worse)} on the same prompts"
        )


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error if there are two."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
