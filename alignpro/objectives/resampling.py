"""Training-free use of the closed form: draw N rewrites from ρ_sft, weight them by softmax(R/λ), keep one.

As N grows, the kept rewrite is distributed as ρ*. It needs rewards only, so it works with a target that gives no
log-probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alignpro.errors import ConfigError


@dataclass(frozen=True)
class GibbsResample:
    """The weights of N rewrites of ρ_sft per prompt, and estimates from them."""

    weights: Tensor
    """(..., N) softmax(R/λ): the probability of keeping each."""
    value: Tensor
    """(...,) λ log Ẑ = λ log (1/N) Σ exp(R/λ), in units of reward: estimates the optimum J_λ(ρ*).

    With exact R, Ẑ is unbiased for Z, so by Jensen's inequality log Ẑ is too low on average, by about Var(Ẑ) / (2 Z²), and
    rises to the optimum as N grows. If R is a mean over M noisy responses, exp(R/λ) is too high on average, and so may be
    the estimate: at λ = .05 with N = 16 and M = 2, for rewards of 0 or 1, it was .07 above the optimum."""
    effective_sample_size: Tensor
    """(...,) 1 / Σ w², in [1, N]. Near 1, a single rewrite carries all the weight and N is too small for this λ."""
    kl: Tensor
    """(...,) log N − entropy(w), nats, in [0, log N]: estimates KL(ρ* || ρ_sft), but cannot exceed log N."""
    reward: Tensor
    """(...,) Σ w R, the self-normalised estimate of E_ρ* R.

    If R is itself a mean over M noisy responses, selecting by it favours lucky ones. To report the reward of the kept
    rewrite, score it again with fresh responses."""


def gibbs_resample(rewards: Tensor, kl_coef: float) -> GibbsResample:
    """Weight samples of ρ_sft towards ρ*.

    Args:
        rewards: (..., N) float, R of N rewrites drawn from ρ_sft (duplicates count as often as they were drawn).
        kl_coef: λ > 0.

    Raises:
        ConfigError: λ ≤ 0.
        ValueError: N is 0.
    """
    if not kl_coef > 0:
        raise ConfigError(f"kl_coef is {kl_coef}: weights softmax(R/λ) need a positive λ")
    count = rewards.shape[-1]
    if count == 0:
        raise ValueError("gibbs_resample: no rewrites to choose from")
    scaled = rewards / kl_coef
    log_weights = scaled.log_softmax(-1)
    weights = log_weights.exp()
    return GibbsResample(
        weights=weights,
        value=kl_coef * (scaled.logsumexp(-1) - math.log(count)),
        effective_sample_size=1.0 / weights.square().sum(-1),
        kl=(weights * log_weights).sum(-1) + math.log(count),
        reward=(weights * rewards).sum(-1),
    )


def best_of_weights(rewards: Tensor) -> Tensor:
    """The weights of best-of-N: 1 for the best of N rewrites, shared equally by those that are equally good.

    Args:
        rewards: (..., N) float.

    Returns:
        (..., N), in the dtype of ``rewards``.
    """
    best = (rewards == rewards.amax(-1, keepdim=True)).to(rewards.dtype)
    return best / best.sum(-1, keepdim=True)


def best_of_kl(weights: Tensor) -> Tensor:
    """The smaller of two upper bounds on the KL of best-of-N to ρ_sft, which is drawn from, for each prompt in nats.

    log N − (N − 1)/N holds for any reward (Beirami et al., 2024, "Theoretical guarantees on the best-of-n alignment policy");
    the mean of log N − entropy(w) does as well, and is smaller where many rewrites are equally good.

    Args:
        weights: (P, N) of `best_of_weights`.

    Returns:
        (P,)
    """
    count = weights.shape[-1]
    by_weights = math.log(count) + torch.xlogy(weights, weights).sum(-1)
    by_count = math.log(count) - (count - 1) / count
    return by_weights if by_weights.mean() < by_count else torch.full_like(by_weights, by_count)
