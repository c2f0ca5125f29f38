"""The results of an evaluation as plain data: the figure and the report display these records and compute nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NotRequired, TypedDict

import numpy as np

from alignpro.evaluation.convergence import Convergence
from alignpro.evaluation.rewards_file import EvaluationRewards
from alignpro.theory.statistics import (
    Clusters,
    Estimate,
    FloatArray,
    Values,
    VarianceParts,
    finite_or_none,
    holm,
    mean_estimate,
    nested_variance,
    paired_estimate,
    prompt_means,
)


@dataclass(frozen=True)
class ArmSummary:
    """One arm of the comparison, such as "no fine-tuning" or "Align-Pro"."""

    name: str
    """The arm's key: ``no_finetuning``, ``instruction_NAME``, ``sft_prompter``, ``gibbs`` (of several numbers, ``gibbs_N``),
    ``align_pro``, ``oracle``."""
    label: str
    reward: Estimate
    """Mean reward over prompts, rewrites and responses, without penalties, with its 95 % interval."""
    penalised: Estimate
    """Likewise with the penalties of guards and truncation; the same in an arm without rewrites, which pays none."""
    variance: VarianceParts
    """Of the rewards without penalties."""
    n: int
    """Number of prompts P."""
    clusters: int
    """Number of independent clusters of prompts; P if every prompt is its own."""
    samples: int
    """Total number of rewards, P · K · M."""
    rewards: FloatArray
    """(P,) mean reward of each prompt, without penalties."""
    binary: bool
    """Whether all rewards without penalties are 0 or 1."""
    difference: Estimate | None = None
    """Mean minus that of no fine-tuning, paired by prompt, without penalties; None for no fine-tuning itself."""
    adjusted_p: float | None = None
    """The difference's p-value, adjusted for the number of arms (Holm); None if there is none."""
    kl: float | None = None
    """KL of the arm's trained model to its initial model, in nats per sequence; None if nothing was trained."""

    @property
    def mean(self) -> float:
        """The mean reward without penalties."""
        return self.reward.value

    @property
    def ci95(self) -> tuple[float, float]:
        """Its 95 % interval; NaN if it is not estimable."""
        return self.reward.low, self.reward.high

    @property
    def total_variance(self) -> float:
        """The variance of the rewards without penalties."""
        return self.variance.total

    def as_dict(self) -> dict[str, Any]:
        """The content for summary.json; undefined numbers are None."""
        difference = None
        if self.difference is not None:
            difference = self.difference.as_dict() | {"adjusted_p": self.adjusted_p}
        return {
            "mean": self.mean,
            "variance": self.variance.total,
            "variance_parts": {
                "prompts": self.variance.prompts,
                "rewrites": self.variance.rewrites,
                "responses": self.variance.responses,
            },
            "ci95": [finite_or_none(bound) for bound in self.ci95],
            "ci95_not_estimable": self.reward.not_estimable,
            "penalised": self.penalised.as_dict(),
            "n": self.n,
            "clusters": self.clusters,
            "samples": self.samples,
            "binary": self.binary,
            "difference": difference,
            "kl": finite_or_none(self.kl),
        }


def summarize_arm(
    name: str,
    label: str,
    rewards: Values,
    *,
    penalised: Values | None = None,
    baseline: Values | None = None,
    clusters: Clusters | None = None,
    kl: float | None = None,
) -> ArmSummary:
    """Mean, interval and variance parts of an arm.

    Args:
        name: The arm's key.
        label: The arm's name in the figure and the report.
        rewards: (P, K, M) without penalties; K = 1 for an arm without rewrites.
        penalised: (P, K, M) with penalties; by default there are none.
        baseline: Rewards of no fine-tuning on the same prompts, (P, ...), for the paired difference.
        clusters: The prompts that belong together; by default every prompt is its own cluster.
        kl: KL in nats per sequence, if the arm was trained.
    """
    means = prompt_means(rewards)
    estimate = mean_estimate(rewards, clusters)
    return ArmSummary(
        name=name,
        label=label,
        reward=estimate,
        penalised=estimate if penalised is None else mean_estimate(penalised, clusters),
        variance=nested_variance(rewards),
        n=len(means),
        clusters=len(means) if clusters is None else clusters.count,
        samples=int(np.prod(np.shape(rewards))),
        rewards=means,
        binary=bool(np.isin(np.asarray(rewards), (0.0, 1.0)).all()),
        difference=None if baseline is None else paired_estimate(rewards, baseline, clusters),
        kl=kl,
    )


def adjusted(arms: Sequence[ArmSummary]) -> list[ArmSummary]:
    """The arms of one report with the p-values of their differences adjusted for the number of comparisons."""
    p = {arm.name: arm.difference.p_value for arm in arms if arm.difference is not None}
    tested = {name: value for name, value in p.items() if value is not None}
    values = dict(zip(tested, holm(list(tested.values())), strict=True))
    return [replace(arm, adjusted_p=values.get(arm.name)) for arm in arms]


@dataclass(frozen=True)
class Bar:
    """What the figure shows of one arm or method."""

    name: str
    """Key of the arm, which decides its colour."""
    label: str
    mean: float
    """Mean reward."""
    ci95: tuple[float, float]
    """Its 95 % interval; NaN if there is none."""
    total_variance: float
    """Variance of the reward."""


@dataclass(frozen=True)
class ArmGroup:
    """The arms of one prompter-target pair: one group of bars."""

    label: str
    arms: Sequence[ArmSummary | Bar]


@dataclass(frozen=True)
class BoundSummary:
    """The bound on the gain of RLHF of the target over prompting (`alignpro.theory.bound`), estimated from samples.

    Its slack does not depend on the prompter, and an estimate of it cannot confirm a theorem, so there is no verdict.
    """

    lhs: float | None
    """J(oracle) − J(prompter), the gap that the bound limits; None if it was not computable."""
    rhs: float | None
    slack: Estimate | None = None
    """Right-hand side minus left-hand side with its interval; it is the same for every prompter."""
    terms: Mapping[str, float] = field(default_factory=dict)
    """The terms of the right-hand side by name, with the signs of the sum."""
    note: str = ""
    """How it was estimated, or why it was not computable."""

    def as_dict(self) -> dict[str, Any]:
        """The content for summary.json."""
        return {
            "lhs": self.lhs,
            "rhs": self.rhs,
            "slack": self.slack.as_dict() if self.slack else None,
            "terms": dict(self.terms),
            "note": self.note,
        }


@dataclass(frozen=True)
class GibbsEstimates:
    """What N rewrites of ρ_sft per prompt say of the optimum J_λ(ρ*), in units of the penalised reward."""

    candidates: int
    log_partition: float
    """λ log Ẑ. Jensen's inequality makes it too low, noise in R too high; which prevails depends on λ, N and M."""
    lower_bound: Estimate
    """Mean reward of resampled rewrites with new responses, minus λ (log N − H(w)): on average not above J_λ(ρ*)."""
    inflation: Estimate
    """λ log Ẑ minus the lower bound: how much the responses that selected a rewrite overstate it."""
    effective_sample_size: float
    kl: float
    """log N − H(w), nats; at most log N."""
    split: Estimate | None = None
    """Like the lower bound, without new responses: half of each rewrite's responses gives the weights, the other half their
    mean reward, both ways. It has no inflation, and is below the lower bound since half the responses weigh less exactly.
    None with a single response per rewrite."""
    noise_variance: float | None = None
    """Var(ε) of R̂ = R + ε, the mean over M responses that weighs a rewrite, estimated within rewrites; exp(R̂/λ) raises
    λ log Ẑ by about Var(ε)/(2λ). None with a single response per rewrite."""

    def as_dict(self) -> dict[str, Any]:
        """The content for summary.json."""
        return {
            "candidates": self.candidates,
            "log_partition": self.log_partition,
            "lower_bound": self.lower_bound.as_dict(),
            "inflation": self.inflation.as_dict(),
            "effective_sample_size": self.effective_sample_size,
            "kl": self.kl,
            "split": self.split.as_dict() if self.split else None,
            "noise_variance": self.noise_variance,
        }


class SampleRow(TypedDict):
    """One response, as shown in the report's table."""

    arm: str
    """Key of the arm."""
    prompt: str
    rewrite: str | None
    """The rewrite given to the target; None if it was given the original prompt."""
    response: str
    reward: float
    """Without penalties."""
    penalised: float
    """With the penalties of guards and truncation."""
    history: NotRequired[list[dict[str, str]]]
    """The turns before the prompt, each with ``role`` and ``content``, if there are any."""


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation."""

    arms: list[ArmSummary]
    gap: Estimate | None
    kl: float | None
    """KL(ρ ‖ ρ_sft) of the trained prompter, in nats per sequence."""
    bound: BoundSummary | None
    gibbs: GibbsEstimates | None
    """From the most candidates."""
    rows: list[SampleRow]
    notes: list[str]
    """What the numbers do not show by themselves."""
    convergence: Mapping[str, Convergence]
    """Key of a trained arm -> whether the reward of its training was still rising, if its run directory is known."""
    seconds: float
    rewards: EvaluationRewards
    """The content of rewards.json."""
    gibbs_by_arm: Mapping[str, GibbsEstimates] = field(default_factory=dict)
    """Key of each arm of Gibbs resampling -> the estimates from its candidates."""
    judge: Mapping[str, Any] | None = None
    """What judges say of the arms (`alignpro.evaluation.judging.Judgement.as_dict`), or ``problem``: why they say nothing."""

    refusals: Mapping[str, Any] | None = None
    """How often the arms refuse (`alignpro.evaluation.refusal_rates.refusals_content`)."""

    def as_dict(self) -> dict[str, Any]:
        """The content of summary.json."""
        gap = self.gap.as_dict() if self.gap else None
        return {
            **{arm.name: arm.as_dict() for arm in self.arms},
            "gap_recovered": gap["value"] if gap else None,
            "gap_recovered_ci95": [gap["low"], gap["high"]] if gap else None,
            "gap_recovered_not_estimable": gap["not_estimable"] if gap else None,
            "kl": self.kl,
            "gibbs_estimates": self.gibbs.as_dict() if self.gibbs else None,
            "gibbs_estimates_by_arm": {name: each.as_dict() for name, each in self.gibbs_by_arm.items()},
            "bound": self.bound.as_dict() if self.bound else None,
            "convergence": {name: each.as_dict() for name, each in self.convergence.items()},
            "notes": self.notes,
            **({"judge": dict(self.judge)} if self.judge is not None else {}),
            **({"refusals": dict(self.refusals)} if self.refusals is not None else {}),
        }
