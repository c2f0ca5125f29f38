"""The measurements of a step, common to all entrants."""

from __future__ import annotations

from dataclasses import dataclass

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
