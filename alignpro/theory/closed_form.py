"""The optimal prompter in closed form, exact for a finite set of candidate rewrites.

    ρ*(x'|x) = ρ_sft(x'|x) exp(R(x, x')/λ) / Z(x)

    J_λ(ρ*)               = λ log Z
    J_λ(ρ*) − J_λ(ρ)      = λ KL(ρ || ρ*)                                 for every ρ
    E_ρ* R − E_ρ_sft R    = λ [ KL(ρ* || ρ_sft) + KL(ρ_sft || ρ*) ]

The last dimension indexes candidates, the others index prompts. Results are per prompt: average them for E_x. A candidate
that a distribution cannot produce has log-probability −inf, so prompts with fewer candidates can be padded.
Source: Align-Pro (AAAI 2025, arXiv 2501.03486), Lemma 1; Peters, Mülling and Altün (2010) for the form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignpro.errors import ConfigError
from alignpro.theory.divergences import kl_divergence


def log_partition(reference_logprob: Tensor, rewards: Tensor, kl_coef: float) -> Tensor:
    """log Z(x) = log Σ ρ_sft exp(R/λ).

    Args:
        reference_logprob: (..., C) log ρ_sft, nats.
        rewards: (..., C) R(x, x').
        kl_coef: λ > 0.

    Returns:
        (...,).

    Raises:
        ConfigError: λ ≤ 0, where ρ* is not defined.
    """
    if not kl_coef > 0:
        raise ConfigError(f"kl_coef is {kl_coef}: the closed form needs a positive KL coefficient")
    return (reference_logprob + rewards / kl_coef).logsumexp(-1)


def optimal_policy(reference_logprob: Tensor, rewards: Tensor, kl_coef: float) -> Tensor:
    """log ρ*(x'|x), (..., C); arguments as `log_partition`."""
    log_z = log_partition(reference_logprob, rewards, kl_coef)
    return reference_logprob + rewards / kl_coef - log_z.unsqueeze(-1)


def expected_reward(logprob: Tensor, rewards: Tensor) -> Tensor:
    """E_ρ R, (...,), from log ρ (..., C) and R (..., C); the reward of an impossible candidate does not matter."""
    return torch.where(logprob > -torch.inf, logprob.exp() * rewards, 0.0).sum(-1)


def objective(logprob: Tensor, reference_logprob: Tensor, rewards: Tensor, kl_coef: float) -> Tensor:
    """J_λ(ρ) = E_ρ R − λ KL(ρ || ρ_sft), (...,), in units of reward; λ may be 0."""
    reward = expected_reward(logprob, rewards)
    return reward if kl_coef == 0 else reward - kl_coef * kl_divergence(logprob, reference_logprob)
