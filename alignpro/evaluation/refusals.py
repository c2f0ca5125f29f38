"""How often each arm's responses refuse harmful and harmless prompts, and how harmful the others are."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from alignpro.config import DataConfig, EvalConfig, RefusalsConfig, RewardConfig
from alignpro.data import Prompt, cluster_labels, load_prompts
from alignpro.evaluation.arms import ArmSampler, ArmSamples
from alignpro.evaluation.heldout_prompts import evaluation_prompts
from alignpro.evaluation.refusal_rates import ArmResponses, Kind, RefusalRates
from alignpro.evaluation.sampled_arms import Trained, sample_arms
from alignpro.rewards import RewardStack, build_reward
from alignpro.rewards.refusals import complies, refusal_rule
from alignpro.rewards.servers import Session
from alignpro.theory.statistics import Clusters, FloatArray

logger = logging.getLogger(__name__)

RULE = "rule: does not refuse"
"""What harm scores are where nothing else is configured."""


def measure_refusals(
    config: EvalConfig,
    refusals: RefusalsConfig,
    sampler: ArmSampler,
    arms: Mapping[str, ArmSamples],
    trained: Trained,
    session: Session,
) -> list[RefusalRates]:
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
    sources: list[tuple[Kind, DataConfig | None]] = [("harmful", refusals.harmful), ("harmless", refusals.harmless)]
    for kind, data in sources:
        if data is None:
            continue
        own = config.model_copy(update={"data": data, "prompts": refusals.prompts})
        # Resampling and best of N choose rewrites by the task's reward. Other arms need none.
        reward = sampler.reward if set(config.candidate_counts) & set(config.sampled_arms) else RewardStack([], [])
        needed = [reward, *([harm] if harm is not None and kind == "harmful" else [])]
        prompts = evaluation_prompts(own, load_prompts(data), sampler.target, trained, needed)
        logger.info("refusals of %d %s prompts", len(prompts), kind)
        sampled = sample_arms(config, ArmSampler(config, prompts, sampler.target, reward, sampler.memory), trained)
        clusters = Clusters(cluster_labels(prompts, data.cluster))
        found.append(refusal_rates(kind, prompts, _texts(config, sampled), clusters, harm, scored_by))
    if refusals.held_out is not None:
        clusters = Clusters(cluster_labels(sampler.prompts, config.data.cluster))
        texts = _texts(config, arms)
        found.append(refusal_rates(refusals.held_out, sampler.prompts, texts, clusters, harm, scored_by))
    return found


def _texts(config: EvalConfig, arms: Mapping[str, ArmSamples]) -> dict[str, list[list[str]]]:
    """Arm → [P][K·M] responses."""
    return {
        name: [[text for sample in group for text in sample] for group in arms[name].scores.responses]
        for name in config.sampled_arms
    }


def refusal_rates(
    kind: Kind,
    prompts: Sequence[Prompt],
    texts: Mapping[str, list[list[str]]],
    clusters: Clusters,
    harm: RewardStack | None = None,
    scored_by: str = RULE,
) -> RefusalRates:
    """Whether each response of arms to prompts refuses and, if the prompts are harmful, how harmful it is.

    Args:
        kind: What the prompts are.
        prompts: P prompts.
        texts: Arm → [P][n] responses.
        clusters: The prompts that belong together.
        harm: Scores harm; None for the rule.
        scored_by: Its name.

    Raises:
        RewardError: The harm score fails.
    """
    harmful = kind == "harmful"
    arms = {
        name: ArmResponses.of(
            np.array([[refusal_rule(text) is not None for text in group] for group in groups], np.float64),
            _harm(prompts, groups, harm) if harmful else None,
        )
        for name, groups in texts.items()
    }
    identities = [prompt.id for prompt in prompts]
    return RefusalRates(kind, identities, clusters.numbers.tolist(), scored_by if harmful else "", arms)


def _harm(prompts: Sequence[Prompt], groups: Sequence[Sequence[str]], harm: RewardStack | None) -> FloatArray:
    """(P, n) harm scores."""
    if harm is None:
        return np.array([[complies(text) for text in group] for group in groups], np.float64)
    repeated = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
    flat = harm(repeated, [text for group in groups for text in group], None).raw
    return np.array(flat, np.float64).reshape(len(prompts), -1)
