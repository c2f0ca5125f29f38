"""What is known of a step, whoever made it."""

from __future__ import annotations

from dataclasses import dataclass

PHASES = ("rollout", "reward", "credit", "update")
"""Both models sample; responses are scored; policy and reference look at the samples again; loss, gradients, weights."""
TOKEN_KINDS = ("prefill", "decode", "recompute", "credit", "update")


@dataclass(frozen=True)
class Step:
    """One step, measured."""

    seconds: float
    phases: dict[str, float]
    """Seconds of each of `PHASES`."""
    tokens: dict[str, int]
    """Tokens that went through a model, for each of `TOKEN_KINDS`: what the rollout computed is told by its first three."""
