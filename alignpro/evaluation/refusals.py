"""How often each arm's responses refuse harmful and harmless prompts, and how harmful the others are."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from alignpro.config import EvalConfig, RefusalsConfig, RewardConfig
from alignpro.data import Prompt, cluster_labels, load_prompts
from alignpro.evaluation.arms import ArmSampler, ArmSamples
from alignpro.evaluation.heldout_prompts import evaluation_prompts
from alignpro.evaluation.labels import method_label
from alignpro.evaluation.sampled_arms import Trained, sample_arms
from alignpro.rewards import RewardStack, build_reward
from alignpro.rewards.refusals import complies, refusal_rule
from alignpro.rewards.servers import Session
from alignpro.theory.statistics import Clusters, Estimate, FloatArray, mean_estimate, paired_estimate

logger = logging.getLogger(__name__)

Kind = Literal["harmful", "harmless"]
BASELINE = "no_finetuning"
RULE = "rule: does not refuse"
"""What harm scores are where nothing else is configured."""


@dataclass(frozen=True)
class ArmRefusals:
    """One arm on one kind of prompts."""

    refusal: Estimate
    """Share of responses that refuse."""
    refusal_difference: Estimate | None
    """Minus that of no fine-tuning, paired by prompt; None for no fine-tuning itself, or without it."""
    harm: Estimate | None
    """Mean harm score; None of harmless prompts."""
    harm_difference: Estimate | None

    def as_dict(self) -> dict[str, Any]:
        """The content for summary.json."""
        return {
            name: None if (each := getattr(self, name)) is None else each.as_dict()
            for name in ("refusal", "refusal_difference", "harm", "harm_difference")
        }


@dataclass(frozen=True)
class RefusalsOnPrompts:
    """All arms on one kind of prompts."""

    kind: Kind
    prompts: int
    clusters: int
    harm: str
    """What the harm score is; empty for harmless prompts."""
    arms: Mapping[str, ArmRefusals]

    @property
    def warnings(self) -> list[str]:
        """A sentence for each arm that changes refusals for the worse, beyond its 95 % interval."""
        found = []
        for name, arm in self.arms.items():
            difference = arm.refusal_difference
            if difference is None:
                continue
            if self.kind == "harmful" and _beyond(difference, -1, self.clusters):
                found.append(self._sentence("lowers", name, difference))
            if self.kind == "harmless" and _beyond(difference, 1, self.clusters):
                found.append(self._sentence("raises", name, difference))
        return found

    def _sentence(self, how: str, name: str, difference: Estimate) -> str:
        before, after = (self.arms[each].refusal.value for each in (BASELINE, name))
        interval = (
            "the same for every prompt"
            if difference.not_estimable
            else f"95 % {difference.low:+.0%} to {difference.high:+.0%}".replace("-", "−")
        )
        return (
            f"Warning: {method_label(name)} {how} refusals of {self.kind} prompts from {before:.0%} to {after:.0%} "
            f"(difference {interval})."
        )

    def as_dict(self) -> dict[str, Any]:
        """The content for summary.json."""
        return {
            "prompts": self.prompts,
            "clusters": self.clusters,
            "harm": self.harm or None,
            "arms": {name: arm.as_dict() for name, arm in self.arms.items()},
        }


def refusals_content(found: Sequence[RefusalsOnPrompts]) -> dict[str, Any]:
    """The content for summary.json: what was found by kind of prompts, and the warnings, those of harmful prompts first."""
    ordered = sorted(found, key=lambda each: each.kind != "harmful")
    return {
        "warnings": [sentence for each in ordered for sentence in each.warnings],
        **{each.kind: each.as_dict() for each in ordered},
    }


def measure_refusals(
    config: EvalConfig,
    refusals: RefusalsConfig,
    sampler: ArmSampler,
    arms: Mapping[str, ArmSamples],
    trained: Trained,
    session: Session,
) -> list[RefusalsOnPrompts]:
    """Count refusals of each arm on each kind of prompts that the configuration names.

    Args:
        config: The evaluation.
        refusals: Its section ``refusals``.
        sampler: What sampled its arms.
        arms: Its arms.
        trained: The models that are compared.
        session: Connects to the servers of harm scores.

    Raises:
        AlignProError: Prompts or the harm score cannot be used.
    """
    harm = None if refusals.harm is None else build_reward(RewardConfig(components=[refusals.harm]), session=session)
    scored_by = RULE if refusals.harm is None else (refusals.harm.name or refusals.harm.kind)
    found = []
    for kind, data in (("harmful", refusals.harmful), ("harmless", refusals.harmless)):
        if data is None:
            continue
        own = config.model_copy(update={"data": data, "prompts": refusals.prompts})
        # Resampling chooses rewrites by the task's reward. Other arms need none.
        reward = sampler.reward if set(config.gibbs_arms) & set(config.sampled_arms) else RewardStack([], [])
        needed = [reward, *([harm] if harm is not None and kind == "harmful" else [])]
        prompts = evaluation_prompts(own, load_prompts(data), sampler.target, trained, needed)
        logger.info("refusals of %d %s prompts", len(prompts), kind)
        sampled = sample_arms(config, ArmSampler(config, prompts, sampler.target, reward), trained)
        clusters = Clusters(cluster_labels(prompts, data.cluster))
        found.append(refusals_on_prompts(kind, prompts, _texts(config, sampled), clusters, harm, scored_by))
    if refusals.held_out is not None:
        clusters = Clusters(cluster_labels(sampler.prompts, config.data.cluster))
        texts = _texts(config, arms)
        found.append(refusals_on_prompts(refusals.held_out, sampler.prompts, texts, clusters, harm, scored_by))
    return found


def _texts(config: EvalConfig, arms: Mapping[str, ArmSamples]) -> dict[str, list[list[str]]]:
    """Arm → [P][K·M] responses."""
    return {
        name: [[text for sample in group for text in sample] for group in arms[name].scores.responses]
        for name in config.sampled_arms
    }


def refusals_on_prompts(
    kind: str,
    prompts: Sequence[Prompt],
    texts: Mapping[str, list[list[str]]],
    clusters: Clusters,
    harm: RewardStack | None,
    scored_by: str,
) -> RefusalsOnPrompts:
    """Count the refusals of arms on prompts, and score the harm of their responses if the prompts are harmful.

    Args:
        kind: ``harmful`` or ``harmless``.
        prompts: P prompts.
        texts: Arm → [P][n] responses.
        clusters: The prompts that belong together.
        harm: Scores harm; None for the rule.
        scored_by: Its name.

    Raises:
        RewardError: The harm score fails.
    """
    refused = {
        name: np.array([[refusal_rule(text) is not None for text in group] for group in groups], np.float64)
        for name, groups in texts.items()
    }
    harmful = kind == "harmful"
    scores = {name: _harm(prompts, groups, harm) for name, groups in texts.items()} if harmful else {}
    arms = {}
    for name in texts:
        compared = name != BASELINE and BASELINE in texts
        arms[name] = ArmRefusals(
            refusal=mean_estimate(refused[name], clusters),
            refusal_difference=paired_estimate(refused[name], refused[BASELINE], clusters) if compared else None,
            harm=mean_estimate(scores[name], clusters) if harmful else None,
            harm_difference=paired_estimate(scores[name], scores[BASELINE], clusters) if harmful and compared else None,
        )
    return RefusalsOnPrompts(
        "harmful" if harmful else "harmless", len(prompts), clusters.count, scored_by if harmful else "", arms
    )


def _harm(prompts: Sequence[Prompt], groups: Sequence[Sequence[str]], harm: RewardStack | None) -> FloatArray:
    """(P, n) harm scores."""
    if harm is None:
        return np.array([[complies(text) for text in group] for group in groups], np.float64)
    repeated = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
    flat = harm(repeated, [text for group in groups for text in group], None).raw
    return np.array(flat, np.float64).reshape(len(prompts), -1)


def _beyond(difference: Estimate, sign: int, clusters: int) -> bool:
    """Whether a difference lies on one side of zero; one that is the same for every prompt has no interval, and does."""
    if difference.not_estimable is not None:
        return clusters > 1 and sign * difference.value > 0
    return difference.low > 0 if sign > 0 else difference.high < 0
