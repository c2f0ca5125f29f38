"""The results of an evaluation as plain data: the figure and the report display these records and compute nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np

from alignpro.evaluation.statistics import (
    Estimate,
    FloatArray,
    Values,
    VarianceParts,
    finite_or_none,
    mean_ci,
    nested_variance,
    paired_bootstrap,
    prompt_means,
)


@dataclass(frozen=True)
class ArmSummary:
    """One arm of the comparison, such as "no fine-tuning" or "Align-Pro"."""

    name: str
    """The arm's key: ``no_finetuning``, ``sft_prompter``, ``align_pro``, ``gibbs``, ``oracle``."""
    label: str
    mean: float
    """Mean reward over prompts, rewrites and responses."""
    ci95: tuple[float, float]
    """95 % bootstrap interval of the mean, over prompts."""
    variance: VarianceParts
    n: int
    """Number of prompts P."""
    samples: int
    """Total number of rewards, P · K · M."""
    rewards: FloatArray
    """(P,) mean reward of each prompt."""
    difference: Estimate | None = None
    """Mean minus that of no fine-tuning, paired by prompt; None for no fine-tuning itself."""
    kl: float | None = None
    """KL of the arm's trained model to its initial model, in nats per sequence; None if nothing was trained."""

    def as_dict(self) -> dict[str, Any]:
        """The content for summary.json; undefined numbers are None."""
        return {
            "mean": self.mean,
            "variance": self.variance.total,
            "variance_parts": {
                "prompts": self.variance.prompts,
                "rewrites": self.variance.rewrites,
                "responses": self.variance.responses,
            },
            "ci95": [finite_or_none(bound) for bound in self.ci95],
            "n": self.n,
            "samples": self.samples,
            "difference": self.difference.as_dict() if self.difference else None,
            "kl": finite_or_none(self.kl),
        }


def summarize_arm(
    name: str,
    label: str,
    rewards: Values,
    *,
    baseline: Values | None = None,
    kl: float | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> ArmSummary:
    """Mean, interval and variance parts of an arm.

    Args:
        name: The arm's key.
        label: The arm's name in the figure and the report.
        rewards: (P, K, M); K = 1 for an arm without rewrites.
        baseline: Rewards of no fine-tuning on the same prompts, (P, ...), for the paired difference.
        kl: KL in nats per sequence, if the arm was trained.
        resamples: Bootstrap samples.
        seed: Seed of the bootstrap.
    """
    estimate = mean_ci(rewards, resamples=resamples, seed=seed)
    means = prompt_means(rewards)
    return ArmSummary(
        name=name,
        label=label,
        mean=estimate.value,
        ci95=(estimate.low, estimate.high),
        variance=nested_variance(rewards),
        n=len(means),
        samples=int(np.prod(np.shape(rewards))),
        rewards=means,
        difference=None if baseline is None else paired_bootstrap(rewards, baseline, resamples=resamples, seed=seed),
        kl=kl,
    )


@dataclass(frozen=True)
class ArmGroup:
    """The arms of one prompter-target pair: one group of bars."""

    label: str
    arms: Sequence[ArmSummary]


@dataclass(frozen=True)
class BoundSummary:
    """The measured bound on the gain of RLHF of the target over prompting (`alignpro.theory.bound`)."""

    lhs: float | None
    """J(oracle) − J(prompter), the gap that the bound limits; None if it was not computable."""
    rhs: float | None
    terms: Mapping[str, float] = field(default_factory=dict)
    """The terms of the right-hand side by name, with the signs of the sum."""
    note: str = ""
    """How it was estimated, or why it was not computable."""

    @property
    def holds(self) -> bool | None:
        """Whether lhs ≤ rhs; None if a side is missing."""
        return None if self.lhs is None or self.rhs is None else self.lhs <= self.rhs


class SampleRow(TypedDict):
    """One response, as shown in the report's table."""

    arm: str
    """Key of the arm."""
    prompt: str
    rewrite: str | None
    """The rewrite given to the target; None if it was given the original prompt."""
    response: str
    reward: float


@dataclass(frozen=True)
class Report:
    """The content of the HTML report."""

    title: str
    pair: str
    """The prompter-target pair, or another short name of the comparison."""
    arms: Sequence[ArmSummary]
    gap: Estimate | None = None
    """Share of the gap recovered."""
    bound: BoundSummary | None = None
    kl_coef: float | None = None
    """λ."""
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Label of a training run -> its rows of metrics.jsonl."""
    rows: Sequence[SampleRow] = ()
    configuration: str = ""
    """The resolved configuration, as YAML."""
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    """The command that reproduces this report."""
    created: str = ""
    notes: Sequence[str] = ()
    """Sentences above the table, such as what was compared and what the numbers do not show."""


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation."""

    arms: list[ArmSummary]
    gap: Estimate | None
    kl: float | None
    """KL(ρ ‖ ρ_sft) of the trained prompter, in nats per sequence."""
    bound: BoundSummary | None
    gibbs: dict[str, float] | None
    """λ log Ẑ, effective sample size and number of candidates."""
    rows: list[SampleRow]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The content of summary.json."""
        return {
            **{arm.name: arm.as_dict() for arm in self.arms},
            "gap_recovered": self.gap.as_dict()["value"] if self.gap else None,
            "gap_recovered_ci95": [self.gap.as_dict()["low"], self.gap.as_dict()["high"]] if self.gap else None,
            "kl": self.kl,
            "gibbs_estimates": self.gibbs,
            "bound": None
            if self.bound is None
            else {
                "lhs": self.bound.lhs,
                "rhs": self.bound.rhs,
                "holds": self.bound.holds,
                "terms": dict(self.bound.terms),
                "note": self.bound.note,
            },
        }
