"""A bound on the gap between prompting a frozen target and fine-tuning it.

For a reward r* in [0, r_max] and TV = ½ L1, with J the expected reward WITHOUT the KL term,

    J(π*) − J(π̃_ρ) ≤ r_max E_x TV(π*(.|x), π_F(.|x))                        the shift due to fine-tuning the target
                   + r_max E_{x, x'~ρ_sft} TV(π_F(.|x), π_F(.|x'))          the shift due to rewriting by ρ_sft
                   + E_{ρ_sft} R − E_ρ R                                    minus the gain from training the prompter

(split J(π*) − J(π_F), J(π_F) − J(π_F∘ρ_sft), J(π_F∘ρ_sft) − J(π_F∘ρ); the first two are at most r_max TV). The last
term is written with divergences as

    λ [ KL(ρ || ρ*) − KL(ρ || ρ_sft) − KL(ρ_sft || ρ*) ]  =  E_{ρ_sft} R − E_ρ R        for every ρ, identically

(subtract identity 2 of `closed_form` at ρ_sft from identity 2 at ρ), so it can be measured without knowing ρ*. For ρ = ρ*
it is at most −λ KL(ρ* || ρ_sft), the form in the paper. Source: Align-Pro (AAAI 2025, arXiv 2501.03486), Theorem 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alignpro.errors import ConfigError
from alignpro.theory.closed_form import expected_reward, optimal_policy
from alignpro.theory.divergences import kl_divergence, total_variation, tv_from_logprobs


@dataclass(frozen=True)
class Bound:
    """Both sides of the bound, in units of reward. If a term cannot be computed, it is None, and so is ``rhs``."""

    lhs: float
    """J(π*) − J(π̃_ρ)."""
    target_shift: float | None
    """r_max E TV(π*, π_F)."""
    rewrite_shift: float | None
    """r_max E TV(π_F(.|x), π_F(.|x'))."""
    prompter_gain: float
    """E_ρ R − E_{ρ_sft} R, which is subtracted."""
    lhs_stderr: float = 0.0
    """Standard error over prompts; 0 if exact."""
    rhs_stderr: float = 0.0
    missing: str | None = None
    """Why the right-hand side is not computable."""
    slack_per_prompt: Tensor | None = None
    """(P,) unbiased estimates of the slack of each prompt, if estimated from samples; their mean is `slack`."""

    @property
    def rhs(self) -> float | None:
        """The sum of the three terms; None if a term is not computable."""
        if self.target_shift is None or self.rewrite_shift is None:
            return None
        return self.target_shift + self.rewrite_shift - self.prompter_gain

    @property
    def slack(self) -> float | None:
        """rhs − lhs, at least 0 if exact; None if the right-hand side is not computable.

        J(π̃_ρ) is on both sides and cancels: the slack is the shifts minus J(π*) − J(π_F∘ρ_sft), the same for every ρ.
        """
        return None if self.rhs is None else self.rhs - self.lhs


def divergence_term(prompter: Tensor, reference: Tensor, rewards: Tensor, kl_coef: float) -> Tensor:
    """λ [ KL(ρ||ρ*) − KL(ρ||ρ_sft) − KL(ρ_sft||ρ*) ], (...,), equal to E_{ρ_sft} R − E_ρ R.

    Args:
        prompter: (..., C) log ρ.
        reference: (..., C) log ρ_sft.
        rewards: (..., C) R.
        kl_coef: λ > 0.
    """
    best = optimal_policy(reference, rewards, kl_coef)
    return kl_coef * (
        kl_divergence(prompter, best) - kl_divergence(prompter, reference) - kl_divergence(reference, best)
    )


def exact_bound(
    *,
    oracle: Tensor,
    target: Tensor,
    target_rewritten: Tensor,
    prompter: Tensor,
    reference: Tensor,
    reward: Tensor,
    r_max: float,
) -> Bound:
    """The bound on finite sets of X prompts (equally likely), C rewrites and Y responses, by exact sums.

    Args:
        oracle: (X, Y) log π*(y|x).
        target: (X, Y) log π_F(y|x).
        target_rewritten: (X, C, Y) log π_F(y|x').
        prompter: (X, C) log ρ(x'|x).
        reference: (X, C) log ρ_sft(x'|x).
        reward: (X, Y) r*(x, y), in [0, r_max].
        r_max: The upper end of the reward.

    Raises:
        ConfigError: A reward is outside [0, r_max].
    """
    _check_range(reward, r_max, "reward")
    values = expected_reward(target_rewritten, reward.unsqueeze(1))  # (X, C) R(x, x')
    shift = total_variation(target.unsqueeze(1), target_rewritten)  # (X, C)
    trained = expected_reward(prompter, values)
    return Bound(
        lhs=float((expected_reward(oracle, reward) - trained).mean()),
        target_shift=float(r_max * total_variation(oracle, target).mean()),
        rewrite_shift=float(r_max * expected_reward(reference, shift).mean()),
        prompter_gain=float((trained - expected_reward(reference, values)).mean()),
    )


def sampled_bound(
    *,
    oracle_rewards: Tensor,
    prompter_rewards: Tensor,
    reference_rewards: Tensor,
    r_max: float,
    oracle_logprobs: tuple[Tensor, Tensor] | None,
    rewrite_logprobs: tuple[Tensor, Tensor] | None,
) -> Bound:
    """The bound estimated from samples for P prompts; each term is unbiased, and ρ* is not needed.

    Args:
        oracle_rewards: (P, n₁) r*(x, y) for y ~ π*(.|x).
        prompter_rewards: (P, n₂) for x' ~ ρ, y ~ π_F(.|x').
        reference_rewards: (P, n₃) for x' ~ ρ_sft, y ~ π_F(.|x').
        r_max: The upper end of the reward.
        oracle_logprobs: (log p, log q), (P, n) each: sequence log-probabilities of responses y to x, where p is whichever
            of π*(.|x) and π_F(.|x) drew y, and q is the other; None if the target gives no log-probabilities.
        rewrite_logprobs: The same for π_F(.|x') and π_F(.|x) with x' ~ ρ_sft; again p is the one that drew y.

    Returns:
        The bound with standard errors over prompts. Without log-probabilities, ``missing`` is set and there is no
        right-hand side.

    Raises:
        ConfigError: A reward is outside [0, r_max], where the theorem does not hold.
        ValueError: The numbers of prompts differ, or a sample has zero probability under p.
    """
    per_prompt = []
    for name, rewards in (
        ("oracle_rewards", oracle_rewards),
        ("prompter_rewards", prompter_rewards),
        ("reference_rewards", reference_rewards),
    ):
        _check_range(rewards, r_max, name)
        if rewards.ndim != 2 or rewards.shape[0] != oracle_rewards.shape[0] or rewards.numel() == 0:
            raise ValueError(f"{name} has shape {tuple(rewards.shape)}: expected ({oracle_rewards.shape[0]}, n)")
        per_prompt.append(rewards.double().mean(1))
    oracle, trained, untrained = per_prompt  # (P,) each
    shifts: list[Tensor | None] = []
    for name, pair in (("oracle_logprobs", oracle_logprobs), ("rewrite_logprobs", rewrite_logprobs)):
        if pair is not None and pair[0].shape[0] != oracle.shape[0]:
            raise ValueError(f"{name} has {pair[0].shape[0]} prompts, oracle_rewards {oracle.shape[0]}")
        shifts.append(None if pair is None else r_max * tv_from_logprobs(pair[0].double(), pair[1].double()).mean(1))
    target_shift, rewrite_shift = shifts
    missing, rhs_stderr, slack = None, 0.0, None
    if target_shift is None or rewrite_shift is None:
        missing = "not computable: the target gives no log-probabilities"
    else:
        rhs_stderr = _stderr(target_shift + rewrite_shift + untrained - trained)
        slack = target_shift + rewrite_shift + untrained - oracle
    return Bound(
        lhs=float((oracle - trained).mean()),
        target_shift=None if target_shift is None else float(target_shift.mean()),
        rewrite_shift=None if rewrite_shift is None else float(rewrite_shift.mean()),
        prompter_gain=float((trained - untrained).mean()),
        lhs_stderr=_stderr(oracle - trained),
        rhs_stderr=rhs_stderr,
        missing=missing,
        slack_per_prompt=slack,
    )


def _stderr(per_prompt: Tensor) -> float:
    if per_prompt.numel() < 2:
        return math.nan
    return float(per_prompt.std()) / math.sqrt(per_prompt.numel())


def _check_range(rewards: Tensor, r_max: float, name: str) -> None:
    low, high = (float(rewards.min()), float(rewards.max())) if rewards.numel() else (0.0, 0.0)
    rounding = 1e-6 * r_max  # of float32, in which rewards are kept, and of weighted sums
    if not (torch.isfinite(rewards).all() and low >= -rounding and high <= r_max + rounding):
        raise ConfigError(
            f"{name} ranges from {low:g} to {high:g}: the bound requires rewards in [0, {r_max:g}]; set r_max to the "
            "upper end of the reward, or shift the reward to start at 0"
        )
