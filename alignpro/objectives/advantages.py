"""Advantages from the reward after each action: one class each.

Layout: B = P·K rows, prompt-major (row = p·K + k), actions at positions 0..length−1 of T. G_t, the return of action t,
is the sum of `token_rewards` from t on. An advantage G_t − b is unbiased if b depends neither on the action a_t nor on
later actions of the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alignpro.errors import ConfigError
from alignpro.objectives.kl import UNBIASED, KLEstimator, check_rows


@dataclass(frozen=True)
class SampledReturns:
    """What an advantage is computed from; all tensors are constants."""

    token_rewards: Tensor
    """(B, T) from `token_rewards`."""
    returns: Tensor
    """(B, T) G_t, from `returns_to_go`."""
    mask: Tensor
    """(B, T) bool, True at the actions."""
    scores: Tensor
    """(B,) R of each row."""
    group: int
    """K: rows per prompt."""
    values: Tensor | None = None
    """(B, T) the critic's V at the state before each action, for an advantage that needs a critic."""
    final: Tensor | None = None
    """(B,) the return past each row's last action, from `final_return`; the score if None."""


class Advantage:
    """The advantage of each action. Subclasses say what they need, and implement ``__call__``.

    An instance lives as long as a run. `update` is called after each step, and the state is part of checkpoints.
    """

    needs_group: ClassVar[bool] = False
    """Whether it compares the samples of one prompt, of which there must be at least 2."""
    needs_critic: ClassVar[bool] = False
    """Whether it reads `SampledReturns.values`, so that a critic is trained beside the policy."""
    reweightable: ClassVar[bool] = False
    """Whether importance weights correct it for samples of an earlier policy: all that a row takes from other rows is a
    baseline, see `importance`."""

    unbiased: bool = False
    """Whether it is the return minus a baseline that depends on no later action; see `is_unbiased`."""

    def __call__(self, sampled: SampledReturns) -> Tensor:
        """Compute the advantages, (B, T), zero outside the mask."""
        raise NotImplementedError

    def weights(self, sampled: SampledReturns) -> Tensor | None:
        """Compute the weight of each row, (B,), by which all its terms in the loss are multiplied: the advantage, the KL
        and the entropy bonus alike, so that λ stays the price of a nat in units of reward. None: all rows weigh 1."""
        return None

    def update(self, mean_return: float) -> None:
        """Take note of a step's mean return of whole sequences, G_0, over all ranks."""

    def state_dict(self) -> dict[str, float]:
        """Return the state to checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore a saved state."""


def returns_to_go(token_rewards: Tensor, mask: Tensor) -> Tensor:
    """G_t = Σ_{u≥t} reward_u, (B, T), zero outside the mask (undiscounted: the objective has no discount)."""
    check_rows(mask)
    rewards = torch.where(mask, token_rewards, 0.0)
    return torch.where(mask, rewards.flip(-1).cumsum(-1).flip(-1), 0.0)


class LeaveOneOut(Advantage):
    """RLOO (Kool et al., 2019; Ahmadian et al., 2024, arXiv 2402.14740), applied at each position. Unbiased.

    The baseline at position t is the mean of the other K−1 rows' returns at t. A row that has ended is held at its final
    return, with no further KL; this keeps the baseline of late positions from rewarding length.
    """

    needs_group = True
    reweightable = True
    unbiased = True

    def __call__(self, sampled: SampledReturns) -> Tensor:
        """Compute the advantages, (B, T).

        Raises:
            ConfigError: K < 2.
            ValueError: Shapes do not match, or B is no multiple of K.
        """
        held = _held(sampled, "leave_one_out")
        baseline = (held.sum(1, keepdim=True) - held) / (sampled.group - 1)  # (P, K, T)
        return torch.where(sampled.mask, sampled.returns - baseline.view_as(sampled.returns), 0.0)


class GroupNormalized(Advantage):
    """GRPO (Shao et al., 2024, arXiv 2402.03300): G_t − mean over a prompt's K rows, at each position, and all terms of the
    prompt over the standard deviation of its scores.

    Biased: the mean includes the row's own return, which shrinks the score's part of the gradient by (K−1)/K, and prompts
    are weighted by how much the scores of their rewrites agree. A prompt of equal scores weighs nothing. Since the KL is
    divided like the scores, λ stays the price of a nat in units of reward; in GRPO as published it is one in units of the
    deviation, of which the metric ``kl_coef_normalized`` gives the equal, λ times the mean weight.

    Args:
        eps: Added to the standard deviation (with K−1 in its denominator). Scores that deviate by no more count as equal.
    """

    needs_group = True

    def __init__(self, eps: float = 1e-4) -> None:
        self.eps = eps

    def __call__(self, sampled: SampledReturns) -> Tensor:
        """Compute the advantages, (B, T), before they are weighted.

        Raises:
            ConfigError: K < 2.
            ValueError: Shapes do not match, or B is no multiple of K.
        """
        held = _held(sampled, "group_normalized")
        advantages = held - held.mean(1, keepdim=True)
        return torch.where(sampled.mask, advantages.view_as(sampled.returns), 0.0)

    def weights(self, sampled: SampledReturns) -> Tensor:
        """Compute the weight of each row, (B,)."""
        deviation = sampled.scores.view(-1, sampled.group).std(1)
        weights = torch.where(deviation > self.eps, 1 / (deviation + self.eps), 0.0)
        return weights.repeat_interleave(sampled.group)


class RunningBaseline(Advantage):
    """REINFORCE with a moving average of earlier steps' returns as baseline (Williams, 1992). Unbiased.

    The baseline of a step comes from the steps before it. At the first step it is 0.

    Args:
        decay: Decay of the moving average, which is bias-corrected like Adam's moments.
    """

    reweightable = True
    unbiased = True

    def __init__(self, decay: float = 0.95) -> None:
        self.decay = decay
        self._sum = 0.0
        self._weight = 0.0

    @property
    def value(self) -> float:
        """b, in units of reward."""
        return self._sum / self._weight if self._weight > 0 else 0.0

    def __call__(self, sampled: SampledReturns) -> Tensor:
        """Compute G_t − b, (B, T)."""
        check_rows(sampled.mask)
        return torch.where(sampled.mask, sampled.returns - self.value, 0.0)

    def update(self, mean_return: float) -> None:
        """Update the average."""
        self._sum = self.decay * self._sum + (1 - self.decay) * mean_return
        self._weight = self.decay * self._weight + (1 - self.decay)

    def state_dict(self) -> dict[str, float]:
        """Return the state to checkpoint."""
        return {"sum": self._sum, "weight": self._weight}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore a saved state."""
        self._sum, self._weight = float(state["sum"]), float(state["weight"])


class GAE(Advantage):
    """Generalised advantage estimation (Schulman et al., 2016, arXiv 1506.02438, eq. 16), without discount.

        δ_t = r_t + V_{t+1} − V_t        A_t = δ_t + lam · A_{t+1}

    After the last action V is 0, whether the sequence ended with its end token or was truncated: the score is that of the
    text as it stands. Unbiased at lam = 1 for any values; for lam < 1 only if the values are exact. The critic's regression
    targets are A + V.

    Args:
        lam: In [0, 1].
    """

    needs_critic = True
    reweightable = True

    def __init__(self, lam: float = 1.0) -> None:
        self.lam = lam
        self.unbiased = lam == 1.0

    def __call__(self, sampled: SampledReturns) -> Tensor:
        """Compute the advantages, (B, T)."""
        check_rows(sampled.mask)
        assert sampled.values is not None  # this class needs a critic
        rewards = torch.where(sampled.mask, sampled.token_rewards, 0.0)
        values = torch.where(sampled.mask, sampled.values.detach(), 0.0).to(rewards.dtype)
        advantages = torch.zeros_like(rewards)
        later_advantage = torch.zeros_like(rewards[:, 0])  # (B,)
        later_value = torch.zeros_like(later_advantage)
        for t in reversed(range(rewards.shape[1])):
            later_advantage = rewards[:, t] + later_value - values[:, t] + self.lam * later_advantage
            later_value = values[:, t]
            advantages[:, t] = later_advantage
        return advantages


def is_unbiased(estimator: KLEstimator, advantage: Advantage) -> bool:
    """Whether the expectation of the policy gradient is exactly ∇J.

    Assumes on-policy samples and ``normalize_by="sequence"``. (A mean over tokens weights a sequence by the lengths of the
    others in its step.) An entropy bonus is part of the objective then.
    """
    return advantage.unbiased and estimator in UNBIASED


def _held(sampled: SampledReturns, what: str) -> Tensor:
    """(P, K, T): the returns, and past the end of a row its final return."""
    check_rows(sampled.mask, scores=sampled.scores)
    returns, group = sampled.returns, sampled.group
    if group < 2:
        raise ConfigError(
            f"objective.advantage={what} with {group} sample per prompt: the baseline is computed from the same "
            "prompt's other samples; use at least 2, or objective.advantage=running_baseline"
        )
    rows, length = returns.shape
    if rows % group:
        raise ValueError(f"{what}: {rows} rows are not a whole number of groups of {group}")
    final = (sampled.scores if sampled.final is None else sampled.final).unsqueeze(-1).to(returns.dtype)
    return torch.where(sampled.mask, returns, final).view(rows // group, group, length)
