"""Policy losses: one class each. A loss of single tokens is three coefficients per token, for `alignpro_kernels.policy_loss`.

    L = Σ_t scale · [ surrogate(logp_t; A_t) + (the KL term, see `kl`) − c · H_t ]
    α = ∂L/∂logp_t        η = ∂L/∂H_t = −scale · c        κ = ∂L/∂KL_t = scale · λ for the exact KL, else 0

N actions, flattened row-major: ``x[mask]`` of a (B, T) tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from alignpro.errors import ConfigError
from alignpro.objectives.kl import KLEstimator, kl_loss_terms
from alignpro_kernels import Coefficients


@dataclass(frozen=True)
class PolicyGradientBatch:
    """The inputs of a loss of single tokens, for N actions; all tensors are treated as constants."""

    advantages: Tensor
    """(N,) float."""
    scale: float | Tensor
    """Weight of a token's terms in the loss: 1 / `loss_count` of the step, or a tensor (N,)."""
    kl_coef: float = 0.0
    """λ, in units of reward per nat."""
    kl_estimator: KLEstimator = "exact"
    reference_logprob: Tensor | None = None
    """(N,) log ρ_sft(a_t|s_t), nats; needed by k2 and k3."""
    old_logprob: Tensor | None = None
    """(N,) log-probability under the policy that drew the rollout, nats; needed by PPO."""
    entropy_coef: float = 0.0
    """c: adds a bonus c·H_t at every visited state. That an action may lead to states of higher entropy is part of its
    return, see `entropy_rewards`."""
    sampled_share: float = 0.0
    """β of the estimator ``regressed``."""


@dataclass(frozen=True)
class LossInputs:
    """What a loss is computed from, for B = P·K rows of at most T actions; all tensors are treated as constants."""

    mask: Tensor
    """(B, T) bool, True at the actions."""
    advantages: Tensor
    """(B, T)."""
    reference_logprob: Tensor
    """(B, T) log ρ_sft(a_t|s_t), nats."""
    old_logprob: Tensor
    """(B, T) log-probability under the policy that drew the rollout, nats."""
    scores: Tensor
    """(B,) R of each row."""
    group: int
    """K: rows per prompt."""
    scale: float
    """1 / `loss_count` of the whole optimizer step."""
    share: float
    """Share of these rows in those of the whole optimizer step."""
    kl_coef: float
    """λ, in units of reward per nat."""
    kl_estimator: KLEstimator
    entropy_coef: float
    sampled_share: float = 0.0
    """β of the estimator ``regressed``."""
    weights: Tensor | None = None
    """(B,) weight of each row's terms, from `Advantage.weights` and `importance_weights`; None: all weigh 1."""

    def actions(self) -> PolicyGradientBatch:
        """Flatten the inputs to the actions alone, (N,)."""
        scale: float | Tensor = self.scale
        if self.weights is not None:
            scale = (self.weights * self.scale).unsqueeze(-1).expand_as(self.mask)[self.mask]
        return PolicyGradientBatch(
            advantages=self.advantages[self.mask],
            scale=scale,
            kl_coef=self.kl_coef,
            kl_estimator=self.kl_estimator,
            reference_logprob=self.reference_logprob[self.mask],
            old_logprob=self.old_logprob[self.mask],
            entropy_coef=self.entropy_coef,
            sampled_share=self.sampled_share,
        )


class LossOutput(NamedTuple):
    """A loss, and metrics that are means over tokens."""

    loss: Tensor
    """(), differentiable."""
    metrics: dict[str, float]
    tokens: int
    """Number of tokens that ``metrics`` are means over."""


class Passes(Protocol):
    """The passes of the policy that a loss may ask for, over the rows of its inputs."""

    def token_loss(self, coefficients: Coefficients) -> Tensor:
        """Sum a loss of single tokens over all actions; see `alignpro_kernels.Coefficients`."""

    def sequence_logprob(self) -> Tensor:
        """Compute log ρ(x'|x) of each row, (B,), differentiable."""


class Loss:
    """A policy's loss. Subclasses say what they need, and implement ``__call__``."""

    on_policy: ClassVar[bool] = False
    """Whether it is valid for one update on each rollout only."""
    needs_group: ClassVar[bool] = False
    """Whether it compares the samples of one prompt, of which there must be at least 2."""
    splits_groups: ClassVar[bool] = False
    """Whether it compares them before its first pass, so that a micro-batch may hold some of them."""
    reads_kl: ClassVar[bool] = True
    """Whether its coefficients read the exact KL, which takes the reference's logits."""
    needs_kl: ClassVar[bool] = False
    """Whether λ must be positive."""
    uses_advantage: ClassVar[bool] = True
    """Whether it reads `LossInputs.advantages`."""
    per_token: ClassVar[bool] = True
    """Whether it is a sum over tokens, with an entropy bonus, a choice of `loss_count`, and the weights of `LossInputs`."""
    any_sampler: ClassVar[bool] = False
    """Whether its minimum is the same for samples of any policy, so that those of an earlier one need no weights."""

    def __call__(self, inputs: LossInputs, passes: Passes) -> LossOutput:
        """Compute the loss of a micro-batch; over all micro-batches of a step the losses add up."""
        raise NotImplementedError


def loss_count(mask: Tensor, normalize_by: Literal["sequence", "token"]) -> int:
    """The normaliser of the loss for a mask (B, T).

    Sum it over the WHOLE optimizer step, so that the gradients of micro-batches and ranks add up correctly.

    ``sequence``: B. The loss is a sum over tokens and a mean over sequences, which is the form of the objective.
    ``token``: N. The loss is a mean over tokens.
    """
    return mask.shape[0] if normalize_by == "sequence" else int(mask.sum())


def cross_entropy(scale: float) -> Coefficients:
    """The coefficients of scale · Σ_t −log ρ(a_t|s_t)."""

    def coefficients(
        logprob: Tensor, entropy: Tensor | None, kl: Tensor | None, rows: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        return -scale * logprob, torch.full_like(logprob, -scale), None, None

    return coefficients


def check_groups(loss: str, rows: Sequence[Tensor], group: int, kl_coef: float) -> None:
    """Check the arguments of a loss that compares whole samples of a prompt by R/λ.

    Args:
        loss: Its name, for messages.
        rows: Its log-probabilities and scores, (B,) each.
        group: K.
        kl_coef: λ.

    Raises:
        ConfigError: K < 2 or λ ≤ 0.
        ValueError: Shapes do not match, or B is no multiple of K.
    """
    if group < 2:
        raise ConfigError(
            f"objective.loss={loss} with {group} sample per prompt: it compares samples within a group, use at least 2"
        )
    if not kl_coef > 0:
        raise ConfigError(f"objective.loss={loss} with kl.coef={kl_coef}: it divides R by λ, which needs a positive λ")
    shapes = [tuple(each.shape) for each in rows]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ValueError(f"{loss}: log-probabilities and scores of {shapes}: expected (B,) for each")
    if shapes[0][0] % group:
        raise ValueError(f"{loss}: {shapes[0][0]} rows are not a whole number of groups of {group}")


class TokenLoss:
    """The coefficients callable of `alignpro_kernels.policy_loss`; accumulates metrics over the chunks it is called on.

    Args:
        batch: The actions.
        clip_range: ε of PPO's clipped surrogate; None for the surrogate −A·logp.
    """

    def __init__(self, batch: PolicyGradientBatch, clip_range: float | None) -> None:
        self.batch = batch
        self.clip_range = clip_range
        self._tokens = 0
        self._clipped: Tensor | float = 0.0
        self._drift: Tensor | float = 0.0

    def __call__(
        self, logprob: Tensor, entropy: Tensor | None, kl: Tensor | None, rows: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The loss terms, α, η and κ of a chunk, each (C,)."""
        batch, dtype = self.batch, logprob.dtype
        advantages = batch.advantages[rows].to(dtype)
        scale = batch.scale[rows].to(dtype) if isinstance(batch.scale, Tensor) else batch.scale

        loss, alpha = self._surrogate(logprob, advantages, rows)
        logratio = None if batch.reference_logprob is None else logprob - batch.reference_logprob[rows].to(dtype)
        terms = kl_loss_terms(batch.kl_estimator, batch.kl_coef, kl, logratio, batch.sampled_share)
        loss = loss if terms.loss is None else loss + terms.loss
        alpha = alpha if terms.alpha is None else alpha + terms.alpha
        kappa = None if terms.kappa is None else scale * terms.kappa
        eta = None
        if batch.entropy_coef:
            if entropy is None:
                raise ValueError("entropy_coef is not 0, but policy_loss was called without entropy=True")
            loss = loss - batch.entropy_coef * entropy
            eta = torch.full_like(entropy, -batch.entropy_coef) * scale
        return scale * loss, scale * alpha, eta, kappa

    def metrics(self) -> dict[str, float]:
        """Means over the tokens seen so far; empty for the plain policy gradient.

        ``clip_fraction`` is the share of tokens whose gradient was clipped to zero. ``old_policy_kl``, in nats per token,
        estimates KL(ρ_old || ρ) with k3 on samples of ρ_old.
        """
        if self.clip_range is None or self._tokens == 0:
            return {}
        return {
            "clip_fraction": float(self._clipped) / self._tokens,
            "old_policy_kl": float(self._drift) / self._tokens,
        }

    def _surrogate(self, logprob: Tensor, advantages: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (C,) and its derivative with respect to logprob (C,), before scaling."""
        if self.clip_range is None:
            return -advantages * logprob, -advantages
        assert self.batch.old_logprob is not None  # `PPOClip.coefficients` checks it
        change = logprob - self.batch.old_logprob[rows].to(logprob.dtype)
        ratio = change.exp()
        bounded = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        gain = torch.minimum(ratio * advantages, bounded * advantages)
        too_high, too_low = ratio > 1 + self.clip_range, ratio < 1 - self.clip_range
        clipped = ((advantages > 0) & too_high) | ((advantages < 0) & too_low)
        self._tokens += rows.numel()
        self._clipped = self._clipped + clipped.sum()
        self._drift = self._drift + (ratio - 1 - change).sum()
        return -gain, torch.where(clipped, 0.0, -advantages * ratio)


class PolicyGradient(Loss):
    """REINFORCE: the surrogate −A·logp, whose gradient −A·∇logp is the score-function estimate. On policy only.

    The value of the loss has no meaning by itself. With an unbiased advantage (`is_unbiased`) the expectation of its
    gradient is −∇J.
    """

    on_policy = True

    def coefficients(self, batch: PolicyGradientBatch) -> TokenLoss:
        """Return the loss of single tokens."""
        return TokenLoss(batch, clip_range=None)

    def __call__(self, inputs: LossInputs, passes: Passes) -> LossOutput:
        """Compute the loss of a micro-batch."""
        batch = inputs.actions()
        coefficients = self.coefficients(batch)
        loss = passes.token_loss(coefficients)
        return LossOutput(loss, coefficients.metrics(), len(batch.advantages))


class PPOClip(PolicyGradient):
    """PPO's clipped surrogate (Schulman et al., 2017, arXiv 1707.06347, eq. 7).

        −min(r·A, clip(r, 1 − ε, 1 + ε)·A)        r = ρ(a_t|s_t) / ρ_old(a_t|s_t)

    At ρ = ρ_old its gradient is the policy gradient's. Off policy it is a local bound on improvement, not an estimate
    of ∇J.

    Args:
        clip_range: ε.
    """

    on_policy = False

    def __init__(self, clip_range: float = 0.2) -> None:
        self.clip_range = clip_range

    def coefficients(self, batch: PolicyGradientBatch) -> TokenLoss:
        """Return the loss of single tokens.

        Raises:
            ValueError: The batch has no ``old_logprob``.
        """
        if batch.old_logprob is None:
            raise ValueError("ppo_clip needs old_logprob in its batch: the log-probabilities from the rollout")
        return TokenLoss(batch, self.clip_range)


def value_loss(values: Tensor, targets: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The critic's regression loss, scale · Σ ½ (V − target)² over the actions: (), differentiable in ``values`` (B, T)."""
    error = torch.where(mask, values - targets.detach().to(values.dtype), 0.0)
    return scale * 0.5 * error.square().sum()
