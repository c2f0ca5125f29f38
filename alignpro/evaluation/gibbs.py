"""Estimates of the optimum J_λ(ρ*) from the candidates of Gibbs resampling."""

from __future__ import annotations

from torch import Tensor

from alignpro.evaluation.results import GibbsEstimates
from alignpro.objectives import GibbsResample
from alignpro.theory.statistics import Clusters, mean_estimate


def gibbs_estimates(weighed: GibbsResample, fresh: Tensor, kl_coef: float, clusters: Clusters) -> GibbsEstimates:
    """λ log Ẑ of the candidates, and a lower bound from new responses to the resampled rewrites.

    Drawing N rewrites of ρ_sft and keeping one with the weights w is itself a prompter, whose KL to ρ_sft is at most
    E[log N − H(w)]. So its mean reward, measured on responses that did not select, minus λ (log N − H(w)) is on average not
    above J_λ(ρ*). λ log Ẑ has the same form with the responses that selected: the difference is their inflation.

    Args:
        weighed: The weights (P, N) of the candidates, and estimates from them.
        fresh: (P, n) values of rewrites that were drawn by these weights, from responses that did not select them.
        kl_coef: λ.
        clusters: The prompts that belong together.
    """
    lower = fresh.double().mean(1) - kl_coef * weighed.kl  # (P,)
    return GibbsEstimates(
        candidates=weighed.weights.shape[1],
        log_partition=weighed.value.mean().item(),
        lower_bound=mean_estimate(lower, clusters),
        inflation=mean_estimate(weighed.value - lower, clusters),
        effective_sample_size=weighed.effective_sample_size.mean().item(),
        kl=weighed.kl.mean().item(),
    )
