"""Estimates of the optimum J_λ(ρ*) from the candidates of Gibbs resampling."""

from __future__ import annotations

from torch import Tensor

from alignpro.evaluation.arms import ArmSampler, ArmSamples
from alignpro.evaluation.results import GibbsEstimates
from alignpro.objectives import GibbsResample, gibbs_resample
from alignpro.theory.statistics import Clusters, mean_estimate


def arm_estimates(
    sampler: ArmSampler, candidates: ArmSamples, resampled: ArmSamples, kl_coef: float, clusters: Clusters
) -> GibbsEstimates:
    """`gibbs_estimates` of an arm and the candidates that it was resampled from."""
    weighed = sampler.gibbs_weights(candidates, kl_coef)
    return gibbs_estimates(weighed, resampled.scores.values, kl_coef, clusters, candidates.scores.penalised)


def gibbs_estimates(
    weighed: GibbsResample, fresh: Tensor, kl_coef: float, clusters: Clusters, rewards: Tensor | None = None
) -> GibbsEstimates:
    """λ log Ẑ of the candidates, and lower bounds from responses that did not select.

    Drawing N rewrites of ρ_sft and keeping one with the weights w is itself a prompter, whose KL to ρ_sft is at most
    E[log N − H(w)]. So its mean reward, measured on responses that did not select, minus λ (log N − H(w)) is on average not
    above J_λ(ρ*). λ log Ẑ has the same form with the responses that selected: the difference is their inflation.

    Args:
        weighed: The weights (P, N) of the candidates, and estimates from them.
        fresh: (P, n) values of rewrites that were drawn by these weights, from responses that did not select them.
        kl_coef: λ.
        clusters: The prompts that belong together.
        rewards: (P, N, M) of the candidates' responses, whose means over M weighed them; with M ≥ 2 they give the estimate
            from halves of the responses and the variance of the noise.
    """
    lower = fresh.double().mean(1) - kl_coef * weighed.kl  # (P,)
    halves = rewards is not None and rewards.shape[2] >= 2
    return GibbsEstimates(
        candidates=weighed.weights.shape[1],
        log_partition=weighed.value.mean().item(),
        lower_bound=mean_estimate(lower, clusters, rewards=False),
        inflation=mean_estimate(weighed.value - lower, clusters, rewards=False),
        effective_sample_size=weighed.effective_sample_size.mean().item(),
        kl=weighed.kl.mean().item(),
        split=mean_estimate(split_log_partition(rewards, kl_coef), clusters, rewards=False)
        if rewards is not None and halves
        else None,
        noise_variance=noise_variance(rewards) if rewards is not None and halves else None,
    )


def split_log_partition(rewards: Tensor, kl_coef: float) -> Tensor:
    """Cross-fitted estimate of λ log Z: (P,), on average not above it, whatever the noise.

    λ log Z = max_w Σ w R − λ KL(w ‖ ρ_sft) over weights w. Half A of the responses chooses w = softmax(R̂_A/λ), the other
    half measures Σ w R̂_B − λ (log N − H(w)), in which R̂_B is unbiased because it did not choose; then the halves change
    places, and both results are averaged.

    Args:
        rewards: (P, N, M) of M ≥ 2 responses to each of N rewrites; of an odd M, the second half has one more.
        kl_coef: λ.
    """
    M = rewards.shape[2]
    first, second = (half.mean(2) for half in rewards.double().split([M // 2, M - M // 2], dim=2))  # (P, N)
    both = []
    for chooses, measures in ((first, second), (second, first)):
        weighed = gibbs_resample(chooses, kl_coef)
        both.append((weighed.weights * measures).sum(1) - kl_coef * weighed.kl)
    return (both[0] + both[1]) / 2


def noise_variance(rewards: Tensor) -> float:
    """The variance of a rewrite's mean over its M responses around its expectation, averaged over rewrites.

    Args:
        rewards: (P, N, M), M ≥ 2.
    """
    return rewards.double().var(2).mean().item() / rewards.shape[2]
