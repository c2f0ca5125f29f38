"""Which checkpoint a run exports: its last, or that with the best held-out estimate of the objective (``run.select``).

The prompts by which it is selected are `data.validation`'s, which are neither trained on nor reported by `alignpro eval`: the
largest of several noisy estimates is too high on the prompts that it was chosen by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from alignpro.training.heldout_evaluation import OBJECTIVE, OBJECTIVE_ERROR


@dataclass(frozen=True)
class Evaluated:
    """The estimate of J after a step."""

    step: int
    objective: float
    error: float | None
    """Its standard error; None for a single prompt."""

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.4f}"
        return f"step {self.step}: J {self.objective:.4f}{error}"


class Selection:
    """The best evaluation so far, and the last one. Its state is part of checkpoints.

    Args:
        active: Whether the best checkpoint is exported; else this selects nothing.
    """

    def __init__(self, active: bool) -> None:
        self.active = active
        self.best: Evaluated | None = None
        self.last: Evaluated | None = None

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the evaluation after a step.

        Args:
            step: Number of steps made.
            metrics: Of the evaluation; without an objective that is a number there is nothing to compare.
        """
        if not self.active or not math.isfinite(metrics.get(OBJECTIVE, math.nan)):
            return
        self.last = Evaluated(step, metrics[OBJECTIVE], metrics.get(OBJECTIVE_ERROR))
        if self.best is None or self.last.objective > self.best.objective:
            self.best = self.last

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation."""
        return None if self.best is None else self.best.step

    def reset(self) -> None:
        """Forget all evaluations."""
        self.best = self.last = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state to checkpoint, which is also what the exported model's record says; empty without evaluations."""
        if self.best is None or self.last is None:
            return {}
        return {"best": asdict(self.best), "last": asdict(self.last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self.active and state:
            self.best, self.last = (Evaluated(**state[each]) for each in ("best", "last"))
