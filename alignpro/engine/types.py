"""What goes into the engine and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from alignpro.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """How a sequence is drawn. ``temperature=0`` is greedy.

    Raises:
        ConfigError: A value is out of its range.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    n: int = 1
    """Completions a prompt."""
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "a number from 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (0 <= self.min_p < 1, "from 0 to below 1"),
            "n": (self.n >= 1, "at least 1"),
        }
        for name, (holds, expected) in ranges.items():
            if not holds:
                raise ConfigError(f"sampling: {name}={getattr(self, name)}: expected {expected}")


@dataclass
class Completion:
    """One sampled sequence."""

    tokens: list[int]
    """The sampled ids, the stop token included where one was drawn."""
    logprobs: list[float]
    """Log-probability of each token under the distribution it was drawn from, in nats."""
    finish_reason: Literal["stop", "length", "error"]
    error: str | None = None

    @property
    def text_tokens(self) -> list[int]:
        """The ids without the stop token: what the sequence says."""
        return self.tokens[:-1] if self.finish_reason == "stop" else self.tokens


@dataclass
class Chain:
    """One sample of the policy with the target's responses to it (none in a one-stage chain)."""

    sample: Completion
    target_tokens: list[int] = field(default_factory=list)
    """The target's prompt: its template around x'."""
    responses: list[Completion] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)
    """What the environment noticed on the way (an empty rewrite: 1.0), to be averaged into metrics."""
