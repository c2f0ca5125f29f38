"""What a comparison of many evaluations found, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignpro.theory.statistics import Estimate, VarianceParts

SEEN_DIFFERENCE = 0.05
"""The difference for which the number of prompts is given, in units of the reward."""


@dataclass(frozen=True)
class Cost:
    """What a method took with one seed; None where it was not recorded."""

    target_calls: float | None = None
    """Responses that were drawn from the target."""
    tokens: float | None = None
    """Tokens that were generated, by prompter and target."""
    seconds: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """The content for a record.json or a summary.json."""
        return {"target_calls": self.target_calls, "tokens": self.tokens, "seconds": self.seconds}


@dataclass(frozen=True)
class Versus:
    """A method against another one, over seeds and prompts."""

    other: str
    """Label of the other one."""
    difference: Estimate
    adjusted_p: float | None
    """Adjusted for all differences of the comparison (Holm); None if it was not tested."""
    needed: str
    """How many prompts it takes to see `SEEN_DIFFERENCE`, as a sentence."""

    def as_dict(self) -> dict[str, Any]:
        """The content for summary.json."""
        return {
            "other": self.other,
            **self.difference.as_dict(),
            "adjusted_p": self.adjusted_p,
            "needed": self.needed,
        }

    @property
    def above(self) -> bool:
        """Whether the method is better, after the adjustment."""
        return self.adjusted_p is not None and self.adjusted_p < 0.05 and self.difference.value > 0

    @property
    def below(self) -> bool:
        """Whether it is worse, after the adjustment."""
        return self.adjusted_p is not None and self.adjusted_p < 0.05 and self.difference.value < 0


@dataclass(frozen=True)
class MethodResult:
    """One method in one group."""

    method: str
    label: str
    seeds: int
    mean: Estimate
    """Mean reward without penalties, over seeds and prompts; over prompts alone if there is one seed."""
    penalised: float
    variance: VarianceParts
    """Of the rewards without penalties; the mean over seeds."""
    samples: int
    """Number of rewards, over all seeds."""
    seed_means: tuple[float, ...]
    """(S,) mean reward of each seed."""
    cost: Cost
    """Mean over seeds."""
    versus_baseline: Versus | None = None
    versus_instruction: Versus | None = None
    """Against the best hand-written instruction; None for instructions, or if there is none."""
    gap: Estimate | None = None
    """Share of the oracle's gain; None without an oracle, and for the oracle and no fine-tuning."""

    def as_dict(self) -> dict[str, Any]:
        """The content for summary.json."""
        return {
            "label": self.label,
            "mean": self.mean.as_dict(),
            "penalised": self.penalised,
            "variance": self.variance.total,
            "seeds": self.seeds,
            "seed_means": list(self.seed_means),
            "samples": self.samples,
            "cost": self.cost.as_dict(),
            "versus_no_finetuning": self.versus_baseline.as_dict() if self.versus_baseline else None,
            "versus_best_instruction": self.versus_instruction.as_dict() if self.versus_instruction else None,
            "gap_recovered": self.gap.as_dict() if self.gap else None,
        }


@dataclass(frozen=True)
class Group:
    """The methods that were evaluated on the same prompts, for one prompter."""

    task: str
    prompter: str
    """Empty if no method has a prompter."""
    target: str
    prompts: int
    clusters: int
    methods: Sequence[MethodResult]
    best_instruction: str | None
    """Key of the hand-written instruction with the highest mean."""

    @property
    def pair(self) -> str:
        """The prompter-target pair."""
        return f"{self.prompter} → {self.target}" if self.prompter else self.target

    def as_dict(self) -> dict[str, Any]:
        """The content for summary.json."""
        return {
            "task": self.task,
            "prompter": self.prompter or None,
            "target": self.target,
            "prompts": self.prompts,
            "clusters": self.clusters,
            "best_instruction": self.best_instruction,
            "methods": {each.method: each.as_dict() for each in self.methods},
        }

    def method(self, key: str) -> MethodResult | None:
        """The result of a method, if it is in the group."""
        return next((each for each in self.methods if each.method == key), None)


@dataclass(frozen=True)
class Comparison:
    """All groups, and what they say in one sentence."""

    groups: Sequence[Group]
    tests: int
    """Number of differences among which p-values are adjusted."""
    verdict: str
    """A change of refusals for the worse comes first."""
    refusals: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Title of a group → what was counted, as `alignpro.evaluation.refusal_rates.refusals_content` returns it."""

    def as_dict(self) -> dict[str, Any]:
        """The content of summary.json."""
        content = {"verdict": self.verdict, "tests": self.tests, "groups": [group.as_dict() for group in self.groups]}
        return content | ({"refusals": dict(self.refusals)} if self.refusals else {})
