"""The paper's bound on the gap between the oracle and prompting, estimated from an evaluation's samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from alignpro.config import EvalConfig
from alignpro.data import Prompt
from alignpro.errors import ConfigError
from alignpro.evaluation.arms import ArmSampler, ArmSamples
from alignpro.evaluation.logprobs import logprobs
from alignpro.evaluation.results import BoundSummary
from alignpro.models.language_model import LanguageModel
from alignpro.targets.local import LocalTarget
from alignpro.theory import sampled_bound
from alignpro.theory.statistics import Clusters, mean_estimate

NO_LOGPROBS = "not computable: the target is behind an endpoint, which gives no log-probabilities"


def estimate_bound(
    config: EvalConfig,
    sampler: ArmSampler,
    arms: Mapping[str, ArmSamples],
    oracle: LanguageModel | None,
    clusters: Clusters,
) -> BoundSummary:
    """Both sides of the bound and its slack. If they cannot be computed, the note states why and the evaluation continues.

    Rewards are those without penalties: the theorem is about r*(x, y), which does not depend on the rewrite.
    """
    if oracle is None or not {"align_pro", "sft_prompter", "oracle"} <= arms.keys():
        return BoundSummary(None, None, note="not computable: it requires a prompter, its reference and an oracle")
    respond = config.respond
    if respond.temperature == 0 or respond.top_k or respond.top_p < 1 or respond.min_p:
        return BoundSummary(
            None, None, note="not computable: responses are not drawn from the target's unfiltered distribution"
        )
    if not isinstance(sampler.target, LocalTarget):
        return BoundSummary(None, None, note=NO_LOGPROBS)
    target = sampler.target.model
    inputs = target_inputs(sampler.target, sampler.prompts)
    P = len(sampler.prompts)

    def flat(name: str) -> torch.Tensor:
        return arms[name].raw.flatten(1)

    # TV(π*, π_F): y ~ π*(.|x), scored under both.
    samples = [chain.sample for group in arms["oracle"].chains for chain in group]
    x = [ids for ids, group in zip(inputs, arms["oracle"].chains, strict=True) for _ in group]
    oracle_pair = [logprobs(m, x, samples, respond.temperature).view(P, -1) for m in (oracle, target)]
    # TV(π_F(.|x), π_F(.|x')): y ~ π_F(.|x'), x' ~ ρ_sft, scored given x' and given x.
    chains = [(i, chain) for i, group in enumerate(arms["sft_prompter"].chains) for chain in group]
    answers = [y for _, chain in chains for y in chain.responses]
    x_prime = [chain.target_tokens for _, chain in chains for _ in chain.responses]
    x = [inputs[i] for i, chain in chains for _ in chain.responses]
    rewrite_pair = [logprobs(target, p, answers, respond.temperature).view(P, -1) for p in (x_prime, x)]
    try:
        bound = sampled_bound(
            oracle_rewards=flat("oracle"),
            prompter_rewards=flat("align_pro"),
            reference_rewards=flat("sft_prompter"),
            r_max=config.r_max,
            oracle_logprobs=(oracle_pair[0], oracle_pair[1]),
            rewrite_logprobs=(rewrite_pair[0], rewrite_pair[1]),
        )
    except ConfigError as error:
        return BoundSummary(None, None, note=f"not computable: {error}")
    terms = {
        "r_max TV(π*, π_F)": bound.target_shift or 0.0,
        "r_max TV(π_F(.|x), π_F(.|x'))": bound.rewrite_shift or 0.0,
        "−(E_ρ R − E_ρ_sft R)": -bound.prompter_gain,
    }
    assert bound.slack_per_prompt is not None  # log-probabilities were given
    slack = mean_estimate(bound.slack_per_prompt, clusters, rewards=False)
    note = (
        f"Estimated from samples without penalties; standard errors of independent prompts {bound.lhs_stderr:.3g} (left) and "
        f"{bound.rhs_stderr:.3g} (right). The reward of the prompter is on both sides, so the slack is the same for every "
        "prompter."
    )
    return BoundSummary(bound.lhs, bound.rhs, slack, terms, note)


def target_inputs(target: LocalTarget, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The target's tokens for each original prompt."""
    return [target.encode(prompt, None).tokens for prompt in prompts]
