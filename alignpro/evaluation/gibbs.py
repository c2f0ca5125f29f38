"""Estimates of the optimum J_λ(ρ*) from the candidates of Gibbs resampling."""

from __future__ import annotations

from alignpro.evaluation.arms import ArmSampler, ArmSamples
from alignpro.evaluation.results import GibbsEstimates
from alignpro.theory.statistics import Clusters, mean_estimate


def gibbs_estimates(
    sampler: ArmSampler, candidates: ArmSamples, resampled: ArmSamples, kl_coef: float, clusters: Clusters
) -> GibbsEstimates:
    """λ log Ẑ of the candidates, and a lower bound from new responses to the resampled rewrites.

    Drawing N rewrites of ρ_sft and keeping one with the weights w is itself a prompter, whose KL to ρ_sft is at most
    E[log N − H(w)]. So its mean reward, measured on responses that did not select, minus λ (log N − H(w)) is on average not
    above J_λ(ρ*). λ log Ẑ has the same form with the responses that selected: the difference is their inflation.

    Args:
        sampler: Weighs the candidates.
        candidates: N rewrites per prompt.
        resampled: Some of them, drawn by weight, with new responses.
        kl_coef: λ.
        clusters: The prompts that belong together.
    """
    weighed = sampler.gibbs_weights(candidates, kl_coef)
    lower = resampled.scores.values.double().mean(1) - kl_coef * weighed.kl  # (P,)
    return GibbsEstimates(
        candidates=candidates.scores.values.shape[1],
        log_partition=weighed.value.mean().item(),
        lower_bound=mean_estimate(lower, clusters),
        inflation=mean_estimate(weighed.value - lower, clusters),
        effective_sample_size=weighed.effective_sample_size.mean().item(),
        kl=weighed.kl.mean().item(),
    )
