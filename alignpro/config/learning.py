"""Losses, advantages, the KL penalty, and the optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from alignpro.config.section import Section


class KLConfig(Section):
    """The KL penalty towards the reference."""

    coef: float = Field(0.05, ge=0)
    """λ, the penalty per nat of sequence KL."""
    estimator: Literal["exact", "k1", "k2", "k3"] = "exact"
    target: float | None = Field(None, gt=0)
    """Target KL in nats per sequence; if given, the coefficient is adapted to reach it."""
    horizon: int = Field(10_000, ge=1)
    """Number of samples over which an adaptive coefficient changes (Ziegler et al., 2019)."""

    @model_validator(mode="after")
    def _check(self) -> KLConfig:
        if self.target is not None and self.coef == 0:
            raise ValueError("a target KL is reached by scaling `coef`, which must be positive")
        return self


class ObjectiveConfig(Section):
    """The loss and the advantages."""

    loss: Literal["policy_gradient", "ppo_clip", "gibbs"] = "policy_gradient"
    advantage: Literal["leave_one_out", "group_normalized", "running_baseline", "gae"] = "leave_one_out"
    kl: KLConfig = KLConfig()
    entropy_coef: float = Field(0.0, ge=0)
    clip_range: float = Field(0.2, gt=0)
    gae_lambda: float = Field(1.0, ge=0, le=1)
    value_coef: float = Field(0.5, ge=0)
    baseline_decay: float = Field(0.95, ge=0, lt=1)
    """Decay of the running baseline."""
    normalize_by: Literal["sequence", "token"] = "sequence"
    """``sequence``: sum over tokens and mean over sequences, the form of the objective. ``token``: mean over all tokens of
    the step."""
    epochs: int = Field(1, ge=1)
    minibatches: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        if self.loss == "policy_gradient" and self.epochs * self.minibatches > 1:
            raise ValueError(
                "policy_gradient is on-policy: it requires epochs=1 and minibatches=1 "
                "(ppo_clip and gibbs may reuse a rollout)"
            )
        if self.loss == "gibbs" and self.kl.coef == 0:
            raise ValueError("gibbs regresses on R/λ: kl.coef must be positive")
        if self.loss == "gibbs" and self.advantage != "leave_one_out":
            raise ValueError("gibbs centres within the group and uses no advantage: leave `advantage` at its default")
        if self.loss == "gibbs" and (self.entropy_coef > 0 or self.normalize_by != "sequence"):
            raise ValueError(
                "gibbs compares whole sequences of a prompt and supports neither an entropy bonus nor a mean over tokens: "
                "leave `entropy_coef` and `normalize_by` at their defaults"
            )
        return self


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW with warm-up."""

    learning_rate: float = Field(1e-5, gt=0)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: float = Field(1.0, gt=0)
    micro_batch_size: int = Field(64, ge=1)
    """Sequences per forward and backward pass; gradients are accumulated over the step's batch."""
