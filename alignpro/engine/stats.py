"""What the engine counts."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise, takewhile

from alignpro.engine.sequence import SampledSequence

KINDS = ("prefill", "decode", "recompute", "wasted")
"""Kinds of computed tokens: prompt tokens, next tokens, tokens recomputed after a preemption, and next tokens of sequences that
turned out to have ended (`async_scheduling`)."""
PHASES = ("plan", "forward", "sample")
"""Phases of a step."""


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
    """Decode batches padded to a fixed shape: ``replayed`` as a CUDA graph, or ``padded`` and run without one. ``captured``
    counts the graphs captured."""
    peak_pages: Counter[str] = field(default_factory=Counter)
    """Model → maximum number of pages it held."""
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds spent in steps, by `PHASES`."""
    run_seconds: float = 0.0
    """Total seconds spent in `Engine.generate`, `Engine.run_chains` and `Engine.step`."""

    def snapshot(self) -> EngineStats:
        """A copy of the current counters."""
        return copy.deepcopy(self)

    def since(self, earlier: EngineStats) -> EngineStats:
        """The difference to an earlier snapshot; ``peak_pages`` is the maximum since the engine was created."""
        counts = {each.name for each in fields(self)} - {"peak_pages", "seconds"}
        spent = {phase: seconds - earlier.seconds.get(phase, 0.0) for phase, seconds in self.seconds.items()}
        return EngineStats(
            **{name: getattr(self, name) - getattr(earlier, name) for name in counts},
            peak_pages=self.peak_pages.copy(),
            seconds=defaultdict(float, spent),
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
        """Metrics for logging, by name. ``engine/decode_ticks/…`` exist only if decode batches have a fixed shape."""
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

    def note_run(self, ended: Sequence[SampledSequence]) -> None:
        """Count the sequences of a run. The last token that each has sampled is never computed."""
        sampled = [len(sequence.output_ids) for sequence in ended]
        self.sequences += len(ended)
        self.sampled_tokens += sum(sampled)
        self.preemptions += sum(sequence.num_preemptions for sequence in ended)
        self.cache_hit_tokens += sum(sequence.num_cached_tokens for sequence in ended)
        prompts = sorted({sequence.request.cache_key for sequence in ended})
        shared = (
            sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
            for (first, one), (second, other) in pairwise(prompts)
            if first == second
        )
        self.floor_tokens += sum(len(prompt) for _, prompt in prompts) - sum(shared)
        self.floor_tokens += sum(max(0, count - 1) for count in sampled)  # a failed sequence may have sampled none
