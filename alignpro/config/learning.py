"""Losses, advantages, the KL penalty, and the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from alignpro.config.section import Section
from alignpro.errors import ConfigError

if TYPE_CHECKING:
    from alignpro.objectives import Advantage, KLEstimator, Loss


class KLConfig(Section):
    """The KL penalty towards the reference."""

    coef: float = Field(0.05, ge=0)
    """λ, the penalty per nat of sequence KL."""
    estimator: Literal["auto", "regressed", "exact", "k1", "k1_sequence", "k2", "k3"] = "auto"
    """See `alignpro.objectives.kl`. ``auto``: ``regressed``, or ``exact`` where a rollout is used for several updates."""
    target: float | None = Field(None, gt=0)
    """Target KL in nats per sequence; if given, the coefficient is adapted to reach it."""
    horizon: int = Field(10_000, ge=1)
    """Number of samples over which an adaptive coefficient changes (Ziegler et al., 2019)."""

    @model_validator(mode="after")
    def _check(self) -> KLConfig:
        if self.target is not None and self.coef == 0:
            raise ValueError("a target KL is reached by scaling `coef`, which must be positive")
        return self


def _name_or_path(*names: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in names and ":" not in value:
            raise ValueError(
                f"expected {', '.join(names)}, or a class as package.module:Class or path/to/file.py:Class"
            )
        return value

    return AfterValidator(check)


class ObjectiveConfig(Section):
    """The loss and the advantages."""

    loss: Annotated[str, _name_or_path("policy_gradient", "ppo_clip", "gibbs", "distillation")] = "policy_gradient"
    """A name, or a class of the user's own that extends `alignpro.objectives.Loss`."""
    loss_params: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the user's own loss."""
    advantage: Annotated[str, _name_or_path("leave_one_out", "group_normalized", "running_baseline", "gae")] = (
        "leave_one_out"
    )
    """A name, or a class of the user's own that extends `alignpro.objectives.Advantage`."""
    advantage_params: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the user's own advantage."""
    kl: KLConfig = KLConfig()
    step_kl: float | None = Field(0.2, gt=0)
    """What KL(ρ_new ‖ ρ_old) of a step should be at most, in nats per sequence: the learning rate is lowered where it would
    be more. None measures and limits nothing, and is the default of ``distillation``, whose step is meant to go far."""
    entropy_coef: float = Field(0.0, ge=0)
    clip_range: float = Field(0.2, gt=0)
    distillation_step: float = Field(1.0, gt=0, le=1)
    """β of the loss ``distillation``: the share of the way to ρ* that the updates on a rollout aim at."""
    distillation_samples: int = Field(2, ge=1)
    """Samples of each prompt that it keeps for them."""
    gae_lambda: float = Field(1.0, ge=0, le=1)
    value_coef: float = Field(0.5, ge=0)
    baseline_decay: float = Field(0.95, ge=0, lt=1)
    """Decay of the running baseline."""
    normalize_by: Literal["sequence", "token"] = "sequence"
    """``sequence``: sum over tokens and mean over sequences, the form of the objective. ``token``: mean over all tokens of
    the step."""
    epochs: int = Field(1, ge=1)
    minibatches: int = Field(1, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _without_limit(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("loss") == "distillation":
            return {"step_kl": None} | given
        return given

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        for key, name, params in (
            ("loss", self.loss, self.loss_params),
            ("advantage", self.advantage, self.advantage_params),
        ):
            if params and ":" not in name:
                raise ValueError(f"{key}_params are the arguments of a class of your own, and {key} is {name}")
        plain = ObjectiveConfig.model_fields["advantage"].default, 0.0, "sequence", 1
        unusual = (self.advantage, self.entropy_coef, self.normalize_by, self.epochs * self.minibatches) != plain
        if unusual or self.kl.coef == 0:
            from alignpro.objectives import LOSSES  # imports torch, for which other configurations need not wait

            if self.loss in LOSSES:  # one of the user's own is checked when it is loaded
                self.check_loss(LOSSES[self.loss])
        return self

    @property
    def kl_estimator(self) -> KLEstimator:
        """The estimator of the KL, chosen if it is ``auto``."""
        if self.kl.estimator != "auto":
            return self.kl.estimator
        return "regressed" if self.epochs * self.minibatches == 1 else "exact"

    def check_loss(self, loss: type[Loss]) -> None:
        """Check that the settings fit the class of the loss.

        Raises:
            ValueError: They do not.
        """
        if loss.on_policy and self.epochs * self.minibatches > 1:
            raise ValueError(
                f"{self.loss} is on-policy: it requires epochs=1 and minibatches=1 "
                "(ppo_clip, gibbs and distillation may reuse a rollout)"
            )
        from alignpro.objectives import SAMPLED

        stale = self.kl_estimator in SAMPLED and self.epochs * self.minibatches > 1
        if stale and loss.uses_advantage and self.kl.coef > 0:
            raise ValueError(
                f"kl.estimator={self.kl_estimator} with several updates per rollout: its KL is that of the policy that drew "
                "the rollout, which is stale after the first update; use exact, or epochs=1 and minibatches=1"
            )
        if loss.needs_kl and self.kl.coef == 0:
            raise ValueError(f"{self.loss} divides R by λ: kl.coef must be positive")
        if not loss.uses_advantage and self.advantage != "leave_one_out":
            raise ValueError(
                f"{self.loss} compares the scores within a group and uses no advantage: leave `advantage` at its default"
            )
        if not loss.per_token and (self.entropy_coef > 0 or self.normalize_by != "sequence"):
            raise ValueError(
                f"{self.loss} compares whole sequences of a prompt and supports neither an entropy bonus nor a mean over "
                "tokens: leave `entropy_coef` and `normalize_by` at their defaults"
            )

    def check_ahead(self, loss: type[Loss], advantage: type[Advantage]) -> None:
        """Check that the settings fit rewrites that are one update old, which are corrected by importance weights.

        Args:
            loss: The class of the loss.
            advantage: The class of the advantage.

        Raises:
            ValueError: They do not.
        """
        if not (loss.per_token or loss.any_sampler):
            raise ValueError(
                f"rollout.ahead=1 with objective.loss={self.loss}: it compares whole sequences, which importance weights do not "
                "correct; use policy_gradient, ppo_clip or gibbs, or rollout.ahead=0"
            )
        if loss.uses_advantage and not advantage.reweightable:
            raise ValueError(
                f"rollout.ahead=1 with objective.advantage={self.advantage}: importance weights correct an advantage that takes "
                "only a baseline from other samples; use leave_one_out, running_baseline or gae, or rollout.ahead=0"
            )
        if self.normalize_by == "token":
            raise ValueError(
                "rollout.ahead=1 with objective.normalize_by=token: the number of tokens is that of samples of another "
                "policy, which importance weights do not correct; use normalize_by=sequence, or rollout.ahead=0"
            )

    def check_group(self, loss: type[Loss], advantage: type[Advantage], group: int, key: str) -> None:
        """Check that there are enough samples per prompt.

        Args:
            loss: The class of the loss.
            advantage: The class of the advantage.
            group: Samples per prompt, K.
            key: Its key in the configuration.

        Raises:
            ValueError: There are not.
        """
        if group >= 2 or not (loss.needs_group or (loss.uses_advantage and advantage.needs_group)):
            return
        if loss.needs_group:
            raise ValueError(
                f"{key}={group} with objective.loss={self.loss}: it compares the samples of a prompt, at least 2"
            )
        what = f"advantage={self.advantage}"
        raise ValueError(
            f"{key}={group} with objective.{what}: a baseline from the same prompt's other samples needs at least 2; "
            "raise it, or use objective.advantage=running_baseline"
        )


Decay = Annotated[float, Field(ge=0, lt=1)]


def _in_one_line(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Validate a number or ``auto`` with one message, where pydantic has one for each branch of a union."""
    try:
        return validate(value)
    except ValidationError as error:
        raise ValueError(f"expected auto or a number from 1 (got {value!r})") from error


MicroBatchSize = Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], WrapValidator(_in_one_line)]


class OptimizerConfig(Section):
    """AdamW with warm-up."""

    learning_rate: float = Field(1e-5, gt=0)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: float = Field(1.0, gt=0)
    micro_batch_size: MicroBatchSize = "auto"
    """Sequences per forward and backward pass; gradients are accumulated over the step's batch. ``auto`` stands for the most
    that fit in memory by formula, which are chosen once for a run; its config.yaml has the number."""

    @property
    def rows_per_pass(self) -> int:
        """``micro_batch_size`` as a number.

        Raises:
            ConfigError: It is ``auto``, and none has been chosen: `alignpro.train` does.
        """
        size = self.micro_batch_size
        if not isinstance(size, int):
            raise ConfigError(
                "optimizer.micro_batch_size=auto: the number is chosen by `alignpro.train`; give one to what is built without it"
            )
        return size
