"""Inputs and outputs of the engine: sampling parameters, completions, target prompts and chains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Literal, NamedTuple, Protocol

from alignpro.errors import ConfigError

LEAST_TEMPERATURE = 1e-4
"""The lowest temperature besides 0: lower ones overflow, and are greedy anyway."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a sequence. ``temperature=0`` is greedy.

    Integers may be NumPy's or scalar tensors, and sequences of any kind; they are kept as plain integers and tuples.

    Raises:
        ConfigError: A value is out of range or of another type.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    n: int = 1
    """Number of completions per prompt."""
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    """Texts that end a sequence."""
    seed: int = 0
    top_logprobs: int | None = None
    """Record the model's own log-probabilities at each position, of the drawn token and of so many likeliest ones; None records
    nothing."""

    def __post_init__(self) -> None:
        for name, convert, expected in _CONVERTED:
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, convert(value))  # the class is frozen
            except TypeError:
                raise ConfigError(f"sampling: {name}={value!r}: expected {expected}") from None
        ranges = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (
                self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < float("inf"),
                f"0, or a finite number of at least {LEAST_TEMPERATURE:g}",
            ),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0, below 1"),
            "n": (self.n >= 1, "at least 1"),
            "stop": (all(self.stop), "non-empty texts"),
            "top_logprobs": (self.top_logprobs is None or self.top_logprobs >= 0, "at least 0"),
        }
        for name, (holds, expected) in ranges.items():
            if not holds:
                raise ConfigError(f"sampling: {name}={getattr(self, name)}: expected {expected}")


def _texts(values: Iterable[str]) -> tuple[str, ...]:
    if isinstance(values, str):  # which is a sequence of texts as well
        raise TypeError
    return tuple(values)


def token_ids(tokens: Iterable[int]) -> tuple[int, ...]:
    """Tokens as plain integers.

    Raises:
        TypeError: They are not integers.
    """
    return tuple(map(index, tokens))


_CONVERTED: Sequence[tuple[str, Callable[[Any], object], str]] = (
    *((name, index, "an integer") for name in ("max_tokens", "top_k", "n", "seed")),
    ("top_logprobs", lambda value: None if value is None else index(value), "an integer, or None"),
    ("stop_token_ids", token_ids, "a sequence of token ids"),
    ("stop", _texts, "a sequence of texts"),
)
"""Name of a field → what makes it a plain value, and what is expected."""


class TokenLogprobs(NamedTuple):
    """What the model's own distribution, at temperature 1 and without filters, says at one position; in nats."""

    token: int
    """The id of the drawn token."""
    logprob: float
    top: tuple[tuple[int, float], ...]
    """Ids of the likeliest tokens with their log-probabilities, the likeliest first."""


@dataclass
class Completion:
    """One sampled sequence."""

    tokens: list[int]
    """The sampled ids, including the stop token if one was drawn."""
    logprobs: list[float]
    """Log-probability of each token under the distribution it was drawn from, in nats."""
    finish_reason: Literal["stop", "length", "error", "cancelled"]
    error: str | None = None
    num_text_tokens: int | None = None
    """Number of whole tokens before the stop text that ended the sequence; None if no stop text did."""
    rest_tokens: tuple[int, ...] = ()
    """The ids of the text between those tokens and a stop text that begins inside a token. They were not sampled."""
    model_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One for each of ``tokens``, if ``SamplingParams.top_logprobs`` asks for them; ``logprobs`` are those of sampling."""

    @property
    def text_tokens(self) -> list[int]:
        """Ids that decode to the text: those sampled without the stop token, or up to the stop text.

        Where a stop text begins inside a token, the text before it is encoded anew (``rest_tokens``); log-probabilities
        are those of ``tokens``.
        """
        if self.num_text_tokens is not None:
            return [*self.tokens[: self.num_text_tokens], *self.rest_tokens]
        return self.tokens[:-1] if self.finish_reason == "stop" else self.tokens


class HasTokens(Protocol):
    """What the policy's sample becomes for the target, with anything that the caller wants back in the chain."""

    @property
    def tokens(self) -> Sequence[int]:
        """The target's prompt: x' in the target's chat template."""


@dataclass(frozen=True)
class TokenPrompt:
    """A target prompt of which nothing but the tokens is wanted."""

    tokens: Sequence[int]


@dataclass
class Chain:
    """One sample of the policy with the target's responses to it (none in a one-stage chain)."""

    sample: Completion
    target_prompt: HasTokens | None = None
    """What ``to_target`` returned for the sample; None if it failed, or in a one-stage chain."""
    responses: list[Completion] = field(default_factory=list)

    @property
    def target_tokens(self) -> list[int]:
        """The tokens of the target's prompt; empty without one."""
        return [] if self.target_prompt is None else list(token_ids(self.target_prompt.tokens))
