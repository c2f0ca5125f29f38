"""The measurements of a step, common to all entrants."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PHASES = ("rollout", "reward", "credit", "update")
"""Sampling from both models; scoring; the samples' log-probabilities under policy and reference; the weight update."""
TOKEN_KINDS = ("prefill", "decode", "recompute", "credit", "update")


@dataclass(frozen=True)
class Step:
    """One step, measured."""

    seconds: float
    phases: dict[str, float]
    """Seconds of each of `PHASES`."""
    tokens: dict[str, int]
    """Tokens that went through a model, for each of `TOKEN_KINDS`; the first three belong to the rollout."""


def median_step(steps: Sequence[Sequence[Step]], chains: int) -> dict[str, Any]:
    """Return the medians over steps, each of which takes as long as its slowest rank, and the tokens of the last.

    Args:
        steps: For each step, the measurements of every rank.
        chains: Number of chains per step.
    """
    step_s = statistics.median(max(rank.seconds for rank in step) for step in steps)
    tokens: Counter[str] = Counter()
    for rank in steps[-1]:
        tokens.update(rank.tokens)
    return {
        "chains_per_s": chains / step_s,
        "step_s": step_s,
        "phases": {
            phase: statistics.median(max(rank.phases[phase] for rank in step) for step in steps)
            for phase in steps[0][0].phases
        },
        "tokens": dict(tokens),
    }


def step_cells(measured: dict[str, Any]) -> list[str]:
    """Return the cells of a table for the seconds of a step and of its phases."""
    return [f"{seconds:.3g} s" for seconds in (measured["step_s"], *(measured["phases"][phase] for phase in PHASES))]
