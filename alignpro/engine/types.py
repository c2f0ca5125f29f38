"""Inputs and outputs of the engine: sampling parameters, completions, chains and statistics."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import Literal

from alignpro.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a sequence. ``temperature=0`` is greedy.

    Raises:
        ConfigError: A value is out of range.
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

    def __post_init__(self) -> None:
        ranges = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "a finite number, at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0, below 1"),
            "n": (self.n >= 1, "at least 1"),
            "stop": (all(self.stop), "non-empty texts"),
        }
        for name, (holds, expected) in ranges.items():
            if not holds:
                raise ConfigError(f"sampling: {name}={getattr(self, name)}: expected {expected}")


@dataclass
class Completion:
    """One sampled sequence."""

    tokens: list[int]
    """The sampled ids, including the stop token if one was drawn."""
    logprobs: list[float]
    """Log-probability of each token under the distribution it was drawn from, in nats."""
    finish_reason: Literal["stop", "length", "error"]
    error: str | None = None
    num_text_tokens: int | None = None
    """Number of tokens before the stop text that ended the sequence; None if no stop text did."""

    @property
    def text_tokens(self) -> list[int]:
        """The ids without the stop token or the tokens of a stop text."""
        if self.num_text_tokens is not None:
            return self.tokens[: self.num_text_tokens]
        return self.tokens[:-1] if self.finish_reason == "stop" else self.tokens


@dataclass
class Chain:
    """One sample of the policy with the target's responses to it (none in a one-stage chain)."""

    sample: Completion
    target_tokens: list[int] = field(default_factory=list)
    """The target's prompt: x' in the target's chat template."""
    responses: list[Completion] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)
    """Observations of the environment (such as 1.0 for an empty rewrite), which are averaged into metrics."""


KINDS = ("prefill", "decode", "recompute")
"""Kinds of computed tokens: prompt tokens, next tokens, and tokens recomputed after a preemption."""
PHASES = ("plan", "forward", "sample")
"""Phases of a tick."""


@dataclass
class EngineStats:
    """Counters since the engine was created."""

    computed: Counter[str] = field(default_factory=Counter)
    """Tokens computed by a model, by `KINDS`."""
    floor_tokens: int = 0
    """Tokens that would have been computed if each prefix shared by prompts of a run had been computed exactly once."""
    cache_hit_tokens: int = 0
    """Prompt tokens that were already computed when their sequence was first admitted."""
    sequences: int = 0
    sampled_tokens: int = 0
    preemptions: int = 0
    ticks: int = 0
    """Forward passes."""
    decode_ticks: Counter[str] = field(default_factory=Counter)
    """Decode ticks padded to a fixed shape: ``replayed`` as a CUDA graph, or ``padded`` and run without one. ``captured``
    counts the graphs captured."""
    peak_pages: Counter[str] = field(default_factory=Counter)
    """Model → maximum number of pages it held."""
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds spent in ticks, by `PHASES`."""
    run_seconds: float = 0.0
    """Total seconds spent in `generate` and `run_chains`."""

    def snapshot(self) -> EngineStats:
        """A copy of the current counters."""
        return copy.deepcopy(self)

    def since(self, earlier: EngineStats) -> EngineStats:
        """The difference to an earlier snapshot; ``peak_pages`` is the maximum since the engine was created."""
        seconds = {phase: spent - earlier.seconds.get(phase, 0.0) for phase, spent in self.seconds.items()}
        return EngineStats(
            computed=self.computed - earlier.computed,
            floor_tokens=self.floor_tokens - earlier.floor_tokens,
            cache_hit_tokens=self.cache_hit_tokens - earlier.cache_hit_tokens,
            sequences=self.sequences - earlier.sequences,
            sampled_tokens=self.sampled_tokens - earlier.sampled_tokens,
            preemptions=self.preemptions - earlier.preemptions,
            ticks=self.ticks - earlier.ticks,
            decode_ticks=self.decode_ticks - earlier.decode_ticks,
            peak_pages=self.peak_pages.copy(),
            seconds=defaultdict(float, seconds),
            run_seconds=self.run_seconds - earlier.run_seconds,
        )

    @classmethod
    def merged(cls, ranks: Sequence[EngineStats]) -> EngineStats:
        """The counters of several engines that ran at the same time: sums of counts, maxima of pages and times."""
        merged = cls(
            floor_tokens=sum(stats.floor_tokens for stats in ranks),
            cache_hit_tokens=sum(stats.cache_hit_tokens for stats in ranks),
            sequences=sum(stats.sequences for stats in ranks),
            sampled_tokens=sum(stats.sampled_tokens for stats in ranks),
            preemptions=sum(stats.preemptions for stats in ranks),
            ticks=sum(stats.ticks for stats in ranks),
            run_seconds=max(stats.run_seconds for stats in ranks),
        )
        for stats in ranks:
            merged.computed += stats.computed
            merged.decode_ticks += stats.decode_ticks
            merged.peak_pages |= stats.peak_pages
            for phase, spent in stats.seconds.items():
                merged.seconds[phase] = max(merged.seconds[phase], spent)
        return merged

    @property
    def floor_ratio(self) -> float:
        """Ratio of computed tokens to `floor_tokens`: below 1 if earlier runs left prompts in the cache; 0 if none ran."""
        return self.computed.total() / self.floor_tokens if self.floor_tokens else 0.0

    def metrics(self) -> dict[str, float]:
        """Metrics for logging, by name. ``engine/decode_ticks/…`` exist only if decode ticks are padded to a fixed shape."""
        return {
            **{f"engine/computed/{kind}": float(self.computed[kind]) for kind in KINDS},
            "engine/floor_ratio": self.floor_ratio,
            "engine/hit_tokens": float(self.cache_hit_tokens),
            "engine/preemptions": float(self.preemptions),
            **{f"engine/pages/{model}": float(pages) for model, pages in sorted(self.peak_pages.items())},
            **{f"engine/decode_ticks/{how}": float(count) for how, count in sorted(self.decode_ticks.items())},
            "engine/tokens_per_s": self.computed.total() / self.run_seconds if self.run_seconds else 0.0,
            **{f"engine/seconds/{phase}": self.seconds[phase] for phase in PHASES},
        }

    def note_pages(self, used: Mapping[str, int]) -> None:
        """Update ``peak_pages`` with the number of pages that each model holds."""
        for model, pages in used.items():
            self.peak_pages[model] = max(self.peak_pages[model], pages)

    def note_floor(self, ran: Sequence[tuple[str, tuple[int, ...], int]]) -> None:
        """Count the sequences of a run, (model, prompt, tokens drawn); the last drawn token is never computed."""
        self.sequences += len(ran)
        self.sampled_tokens += sum(drawn for *_, drawn in ran)
        prompts = sorted({(model, prompt) for model, prompt, _ in ran})
        shared = (
            sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
            for (first, one), (second, other) in pairwise(prompts)
            if first == second
        )
        self.floor_tokens += sum(len(prompt) for _, prompt in prompts) - sum(shared)
        self.floor_tokens += sum(max(0, drawn - 1) for *_, drawn in ran)  # a failed sequence may have drawn none
