"""Builds the objective of a run from its configuration: the loss, the advantage and the KL penalty.

Loss and advantage may be the user's own classes.
"""

from __future__ import annotations

from typing import Any, TypeVar

from alignpro.config import ObjectiveConfig
from alignpro.config.dotted_path import load_class
from alignpro.errors import ConfigError
from alignpro.objectives import ADVANTAGES, LOSSES, AdaptiveKL, Advantage, KLPenalty, Loss

T = TypeVar("T")


def build_objective(config: ObjectiveConfig, group: int, ahead: bool = False) -> tuple[Loss, Advantage, KLPenalty]:
    """Build the loss, the advantage and the KL penalty of a run.

    Args:
        config: Their names and settings.
        group: Samples per prompt, K.
        ahead: Whether samples are one update old.

    Raises:
        ConfigError: A class of the user's own cannot be loaded or made, or the settings do not fit it.
    """
    loss = LOSSES.get(config.loss) or load_class(config.loss, Loss, "objective.loss")
    advantage = ADVANTAGES.get(config.advantage) or load_class(config.advantage, Advantage, "objective.advantage")
    try:
        config.check_loss(loss)
        config.check_group(loss, advantage, group, "samples per prompt")
        if ahead:
            config.check_ahead(loss, advantage)
    except ValueError as error:
        raise ConfigError(f"objective: {error}") from error
    settings: dict[str, dict[str, Any]] = {
        "ppo_clip": {"clip_range": config.clip_range},
        "distillation": {"step": config.distillation_step, "samples": config.distillation_samples},
        "running_baseline": {"decay": config.baseline_decay},
        "gae": {"lam": config.gae_lambda},
    }
    return (
        _make(loss, settings.get(config.loss, config.loss_params), f"objective.loss {config.loss}"),
        _make(
            advantage,
            settings.get(config.advantage, config.advantage_params),
            f"objective.advantage {config.advantage}",
        ),
        KLPenalty(config.kl_estimator, AdaptiveKL(config.kl.coef, config.kl.target, config.kl.horizon)),
    )


def _make(kind: type[T], arguments: dict[str, Any], what: str) -> T:
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{what}: it cannot be made with {sorted(arguments)}: {error}") from error
