"""The KL penalty: where each estimator of KL(ρ || ρ_sft) enters, and what its gradient estimates.

J = E R − λ E Σ_t KL_t has the gradient (both parts are needed)

    ∇J = E[ Σ_t ∇log ρ(a_t|s_t) · (R − b − λ Σ_{u>t} KL_u) − λ Σ_t ∇KL_t ]

With l_t = log ρ(a_t|s_t) − log ρ_sft(a_t|s_t) and L = Σ_t l_t of the whole sequence:

    estimator    return of action t                   loss at t                what the gradient estimates
    exact        R − λ Σ_{u>t} KL_u                   λ KL_t, over all tokens  ∇J
    k1           R − λ Σ_{u≥t} l_u                    nothing                  ∇J
    k1_sequence  R − λ L                              nothing                  ∇J; that of the Gibbs loss over −λ
    regressed    R − λ (β L + (1−β) Σ_{u>t} KL_u)     λ (1−β) KL_t             ∇J
    k2           R                                    λ ½ l_t²                 ∇E R − λ E Σ_t ∇KL(ρ || ρ_sft)_t
    k3           R                                    λ (e^{−l_t} − 1 + l_t)   ∇E R − λ E Σ_t ∇KL(ρ_sft || ρ)_t

The first four are unbiased and differ in variance. Which of them varies least depends on where ρ is: at ρ* R − λ L is the
same number for all samples, so that k1_sequence has no variance at all, while exact keeps that of R; away from the path
to ρ*, L is mere noise, and exact varies least. ``regressed`` mixes the two as a control variate: β is the coefficient of
the regression of R on λ L in the samples of earlier steps, between 0 and 1. `benchmarks.estimators` measures all.

k2 and k3 (the form of GRPO) estimate only one part of the KL's gradient: they ignore that an action may lead to states of
high KL. Moreover, k3 minimises the KL in the other direction at each state. The names are Schulman's ("Approximating KL
divergence", 2020). The VALUE of k3 is an unbiased estimate of KL_t, but its gradient is not an unbiased estimate of
∇KL_t, because differentiating it ignores that the samples come from ρ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

KLEstimator: TypeAlias = Literal["regressed", "exact", "k1", "k1_sequence", "k2", "k3"]

UNBIASED: tuple[KLEstimator, ...] = ("regressed", "exact", "k1", "k1_sequence")
"""The estimators whose gradient is that of the objective, on policy."""
SAMPLED: tuple[KLEstimator, ...] = ("regressed", "k1", "k1_sequence")
"""Those whose return contains the log-ratio of the policy that drew the samples: it is stale after the first update."""


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
    sampled_share: float = 0.0,
) -> Tensor:
    """The reward after each action: the score at the last one, and the KL penalty of the estimator.

    Args:
        scores: (B,) float, R of each sequence.
        mask: (B, T) bool, True at the actions, which start at position 0. A truncated sequence has no end token; its last
            action is its last token.
        kl_coef: λ.
        estimator: See the module docstring.
        kl: (B, T) exact KL_t at the state before each action, in nats; for ``exact`` and ``regressed``.
        logratio: (B, T) l_t; for ``k1``, ``k1_sequence`` and ``regressed``.
        sampled_share: β of ``regressed``.

    Returns:
        (B, T) in the dtype of ``scores``, zero outside the mask; the sum from t on is the return of action t.

    Raises:
        ValueError: Shapes do not match, the mask is not left-aligned, or the estimator's input is missing.
    """
    check_rows(mask, scores=scores)
    share = _share(estimator, sampled_share)
    rewards = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
    if share is not None and share < 1 and kl_coef != 0:
        future = _inside(kl, mask, "kl", estimator).to(scores.dtype)
        rewards[:, :-1] -= kl_coef * (1 - share) * future[:, 1:]
    elif estimator == "k1" and kl_coef != 0:
        rewards -= kl_coef * _inside(logratio, mask, "logratio", estimator).to(scores.dtype)
    final = final_return(scores, mask, kl_coef, estimator, logratio, sampled_share)
    return rewards + torch.where(last_action(mask), final.unsqueeze(-1), 0.0)


def final_return(
    scores: Tensor,
    mask: Tensor,
    kl_coef: float,
    estimator: KLEstimator,
    logratio: Tensor | None = None,
    sampled_share: float = 0.0,
) -> Tensor:
    """The return of a sequence that has ended: its score, less the penalty charged to the sequence as a whole, λ β L.

    The arguments are those of `token_rewards`.

    Returns:
        (B,) in the dtype of ``scores``.
    """
    share = _share(estimator, sampled_share)
    if not share or kl_coef == 0:
        return scores
    return scores - kl_coef * share * _inside(logratio, mask, "logratio", estimator).to(scores.dtype).sum(-1)


def kl_loss_terms(
    estimator: KLEstimator,
    kl_coef: float,
    kl: Tensor | None = None,
    logratio: Tensor | None = None,
    sampled_share: float = 0.0,
) -> KLLossTerms:
    """The part of the KL penalty that enters the loss, per token.

    Args:
        estimator: See the module docstring.
        kl_coef: λ.
        kl: (N,) exact KL; for ``exact`` and ``regressed``.
        logratio: (N,) l, under the current policy; for ``k2`` and ``k3``.
        sampled_share: β of ``regressed``.

    Raises:
        ValueError: The estimator's input is missing.
    """
    if estimator not in ("k2", "k3"):
        coef = exact_kl_coef(estimator, kl_coef, sampled_share)
        if coef == 0:
            return KLLossTerms(None, None, None)
        if kl is None:
            raise ValueError(
                f"kl_loss_terms: estimator {estimator!r} needs the exact KL: give policy_loss the reference"
            )
        return KLLossTerms(coef * kl, None, torch.full_like(kl, coef))
    if kl_coef == 0:
        return KLLossTerms(None, None, None)
    if logratio is None:
        raise ValueError(f"kl_loss_terms: estimator {estimator!r} needs logratio: give the batch reference_logprob")
    if estimator == "k2":
        return KLLossTerms(kl_coef * 0.5 * logratio.square(), kl_coef * logratio, None)
    return KLLossTerms(kl_coef * (torch.expm1(-logratio) + logratio), -kl_coef * torch.expm1(-logratio), None)


def exact_kl_coef(estimator: KLEstimator, kl_coef: float, sampled_share: float = 0.0) -> float:
    """The coefficient of the exact KL in the loss; where it is 0, the loss needs no states of the reference."""
    share = _share(estimator, sampled_share)
    return 0.0 if share is None else kl_coef * (1 - share)


def _share(estimator: KLEstimator, sampled_share: float) -> float | None:
    """β; None for estimators that are no mixture of the exact KL and the whole sequence's log-ratio."""
    shares: dict[KLEstimator, float] = {"exact": 0.0, "k1_sequence": 1.0, "regressed": sampled_share}
    return shares.get(estimator)


def _inside(values: Tensor | None, mask: Tensor, name: str, estimator: KLEstimator) -> Tensor:
    """The values (B, T) as constants, zero outside the mask."""
    if values is None or values.shape != mask.shape:
        raise ValueError(f"token_rewards: estimator {estimator!r} needs {name} of shape {tuple(mask.shape)}")
    return torch.where(mask, values.detach(), 0.0)


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


_KNOWN = 0.03
"""Standard deviation of log-ratios in nats, far above rounding in float32, below which β tends to 0."""


class KLPenalty:
    """The KL penalty of a run: the estimator, λ, and β of ``regressed``. Its state is part of checkpoints.

    β = Σ cov(R, λ L) / Σ var(λ L), clipped to [0, 1], with covariances within a prompt's samples and sums that fade over
    earlier steps. A step's β must not depend on its own samples, or the gradient would be biased. It is 0 at first, and
    while the log-ratios differ by little more than rounding.

    Args:
        estimator: See the module docstring.
        coef: λ.
        decay: Factor by which the sums fade each step.
    """

    def __init__(self, estimator: KLEstimator, coef: AdaptiveKL, decay: float = 0.9) -> None:
        self.estimator, self._coef, self._decay = estimator, coef, decay
        self._covariance = self._variance = 0.0

    @property
    def coef(self) -> float:
        """λ, in units of reward per nat."""
        return self._coef.coef

    @property
    def sampled_share(self) -> float:
        """β."""
        return min(max(self._covariance / self._variance, 0.0), 1.0) if self._variance > 0 else 0.0

    def penalize(self, scores: Tensor, mask: Tensor, kl: Tensor, logratio: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the rewards of the actions, (B, T), and the returns past the last one, (B,); see `token_rewards`."""
        share = self.sampled_share
        rewards = token_rewards(scores, mask, self.coef, self.estimator, kl, logratio, share)
        return rewards, final_return(scores, mask, self.coef, self.estimator, logratio, share)

    def update(self, kl: float, samples: int, covariance: float, variance: float) -> None:
        """Adapt λ and β to a step.

        Args:
            kl: Mean sequence KL, in nats.
            samples: Number of samples that it is the mean of, and that the sums are over.
            covariance: Σ (R − mean)(L − mean) over the step's samples, with the means of each prompt.
            variance: Σ (L − mean)².
        """
        coef = self.coef
        self._covariance = self._decay * self._covariance + coef * covariance
        self._variance = self._decay * self._variance + coef**2 * (variance + samples * _KNOWN**2)
        self._coef.update(kl, samples)

    def metrics(self) -> dict[str, float]:
        """λ, and β where it is in use."""
        share = {"kl_sampled_share": self.sampled_share} if self.estimator == "regressed" else {}
        return {"kl_coef": self.coef, **share}

    def state_dict(self) -> dict[str, float]:
        """Return the state to checkpoint; target and horizon of λ are configuration."""
        return {"coef": self.coef, "covariance": self._covariance, "variance": self._variance}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore a saved state; that of a run older than ``regressed`` holds λ alone."""
        self._coef.coef = float(state["coef"])
        self._covariance, self._variance = float(state.get("covariance", 0.0)), float(state.get("variance", 0.0))


def entropy_rewards(entropy: Tensor, mask: Tensor, entropy_coef: float) -> Tensor:
    """The reward after each action for the entropy of the state that it leads to, c·H_{t+1}, (B, T).

    With it, and the bonus c·H_t in the loss, the gradient is that of E[R + c Σ_t H_t]; without it, the bonus would ignore
    that an action may lead to states of higher entropy.

    Args:
        entropy: (B, T) of the policy at the state before each action, in nats.
        mask: (B, T) bool, True at the actions.
        entropy_coef: c.
    """
    rewards = torch.zeros_like(entropy)
    if entropy_coef:
        rewards[:, :-1] = entropy_coef * torch.where(mask, entropy.detach(), 0.0)[:, 1:]
    return rewards


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
