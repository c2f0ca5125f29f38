"""The KL penalty: where each estimator of KL(ρ || ρ_sft) enters, and what its gradient estimates.

J = E R − λ E Σ_t KL_t has the gradient (exact, both parts are needed)

    ∇J = E[ Σ_t ∇log ρ(a_t|s_t) · (R − b − λ Σ_{u>t} KL_u) − λ Σ_t ∇KL_t ]

With l_t = log ρ(a_t|s_t) − log ρ_sft(a_t|s_t):

    estimator  reward after action t  loss at t                what the gradient estimates
    exact      −λ KL_{t+1}            λ KL_t, over all tokens  ∇J; the KL itself adds little noise
    k1         −λ l_t                 nothing                  ∇J; its own noise, which near ρ* cancels that of R
    k2         nothing                λ ½ l_t²                 ∇E R − λ E Σ_t ∇KL(ρ || ρ_sft)_t
    k3         nothing                λ (e^{−l_t} − 1 + l_t)   ∇E R − λ E Σ_t ∇KL(ρ_sft || ρ)_t

exact and k1 are unbiased. k2 and k3 (the form of GRPO) estimate only one part of the KL's gradient: they ignore that an
action may lead to states of high KL. Moreover, k3 minimises the KL in the other direction at each state. The names are
Schulman's ("Approximating KL divergence", 2020). The VALUE of k3 is an unbiased estimate of KL_t, but its gradient is not
an unbiased estimate of ∇KL_t, because differentiating it ignores that the samples come from ρ.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

KLEstimator: TypeAlias = Literal["exact", "k1", "k2", "k3"]


class KLLossTerms(NamedTuple):
    """The KL's contribution to each token's loss and to its derivatives in logp and KL; None means zero."""

    loss: Tensor | None
    """(N,)"""
    alpha: Tensor | None
    """(N,) derivative with respect to the token's log-probability."""
    kappa: Tensor | None
    """(N,) derivative with respect to the token's exact KL."""


def token_rewards(
    scores: Tensor,
    mask: Tensor,
    kl_coef: float,
    estimator: KLEstimator,
    kl: Tensor | None = None,
    logratio: Tensor | None = None,
) -> Tensor:
    """The reward after each action: the score at the last one, and the KL penalty of the estimator at each.

    Args:
        scores: (B,) float, R of each sequence.
        mask: (B, T) bool, True at the actions, which start at position 0. A truncated sequence has no end token; its last
            action is its last token.
        kl_coef: λ.
        estimator: See the module docstring.
        kl: (B, T) exact KL_t at the state before each action, in nats; for ``exact``.
        logratio: (B, T) l_t; for ``k1``.

    Returns:
        (B, T) in the dtype of ``scores``, zero outside the mask; the sum from t on is the return of action t.

    Raises:
        ValueError: Shapes do not match, the mask is not left-aligned, or the estimator's input is missing.
    """
    check_rows(mask, scores=scores)
    rewards = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
    if estimator == "exact" and kl_coef != 0:
        if kl is None or kl.shape != mask.shape:
            raise ValueError(f"token_rewards: estimator 'exact' needs kl of shape {tuple(mask.shape)}")
        future = torch.where(mask, kl.detach(), 0.0).to(scores.dtype)
        rewards[:, :-1] -= kl_coef * future[:, 1:]
    elif estimator == "k1" and kl_coef != 0:
        if logratio is None or logratio.shape != mask.shape:
            raise ValueError(f"token_rewards: estimator 'k1' needs logratio of shape {tuple(mask.shape)}")
        rewards -= kl_coef * torch.where(mask, logratio.detach(), 0.0).to(scores.dtype)
    return rewards + torch.where(last_action(mask), scores.unsqueeze(-1), 0.0)


def kl_loss_terms(
    estimator: KLEstimator, kl_coef: float, kl: Tensor | None = None, logratio: Tensor | None = None
) -> KLLossTerms:
    """The part of the KL penalty that enters the loss, per token.

    Args:
        estimator: See the module docstring.
        kl_coef: λ.
        kl: (N,) exact KL; for ``exact``.
        logratio: (N,) l, under the current policy; for ``k2`` and ``k3``.

    Raises:
        ValueError: The estimator's input is missing.
    """
    if kl_coef == 0 or estimator == "k1":
        return KLLossTerms(None, None, None)
    if estimator == "exact":
        if kl is None:
            raise ValueError("kl_loss_terms: estimator 'exact' needs the exact KL: give policy_loss the reference")
        return KLLossTerms(kl_coef * kl, None, torch.full_like(kl, kl_coef))
    if logratio is None:
        raise ValueError(f"kl_loss_terms: estimator {estimator!r} needs logratio: give the batch reference_logprob")
    if estimator == "k2":
        return KLLossTerms(kl_coef * 0.5 * logratio.square(), kl_coef * logratio, None)
    return KLLossTerms(kl_coef * (torch.expm1(-logratio) + logratio), -kl_coef * torch.expm1(-logratio), None)


class AdaptiveKL:
    """λ, fixed or adapted towards a target KL (Ziegler et al., 2019, arXiv 1909.08593, section 2.2).

    After n samples of mean sequence KL k:  λ ← λ (1 + clip(k / target − 1, −0.2, 0.2) · n / horizon).

    Args:
        coef: Initial λ.
        target: Target KL in nats per sequence; None keeps λ fixed.
        horizon: Number of samples over which λ changes by up to a fifth.
    """

    def __init__(self, coef: float, target: float | None = None, horizon: int = 10_000) -> None:
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, samples: int) -> float:
        """Update λ with the mean sequence KL (nats) of ``samples`` sequences, and return it."""
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            # A step of more samples than the horizon must not turn λ negative.
            self.coef *= 1.0 + error * min(samples / self.horizon, 1.0)
        return self.coef

    def state_dict(self) -> dict[str, float]:
        """The state to checkpoint; target and horizon are configuration."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore a saved state."""
        self.coef = float(state["coef"])


def last_action(mask: Tensor) -> Tensor:
    """(B, T) bool: True at each row's last action; all False in a row without actions."""
    ends_after = torch.zeros_like(mask)
    ends_after[:, :-1] = mask[:, 1:]
    return mask & ~ends_after


def check_rows(mask: Tensor, **per_row: Tensor) -> None:
    """Check that ``mask`` is (B, T) bool and left-aligned, and that the other tensors are (B,).

    Raises:
        ValueError: One of them is not; the message names it.
    """
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}: expected bool of shape (B, T)")
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("mask is not left-aligned: actions must start at position 0 and have no holes")
    for name, value in per_row.items():
        if value.shape != mask.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: expected ({mask.shape[0]},), one per row of mask")
