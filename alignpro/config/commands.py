"""Which command of `alignpro` each configuration is of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from alignpro.config.experiment import ExperimentConfig
from alignpro.config.jobs import (
    EvalConfig,
    HeadroomConfig,
    OptimalConfig,
    RewardModelConfig,
    RLHFConfig,
    SFTConfig,
    TrainConfig,
)
from alignpro.config.judging import JudgeConfig
from alignpro.config.rival import RivalConfig
from alignpro.config.sweep import SweepConfig

COMMANDS: dict[str, type[BaseModel]] = {
    "sft": SFTConfig,
    "reward": RewardModelConfig,
    "train": TrainConfig,
    "rlhf": RLHFConfig,
    "eval": EvalConfig,
    "headroom": HeadroomConfig,
    "optimal": OptimalConfig,
    "experiment": ExperimentConfig,
    "judge": JudgeConfig,
    "sweep": SweepConfig,
    "rival": RivalConfig,
}
"""Command → its configuration."""


def fitting_commands(kind: type[BaseModel], raw: Any) -> list[str]:
    """Return the commands whose top-level keys a configuration has, if ``kind`` is of another command and does not fit.

    Args:
        kind: What the configuration was read as.
        raw: The configuration, as it was read.
    """
    if kind not in COMMANDS.values() or not isinstance(raw, dict) or fits(kind, raw):
        return []
    return [name for name, other in COMMANDS.items() if fits(other, raw)]


def fits(kind: type[BaseModel], raw: dict[str, Any]) -> bool:
    """Whether a configuration has all required keys at the top level, and none that is unknown there."""
    required = {name for name, field in kind.model_fields.items() if field.is_required()}
    return required <= raw.keys() <= kind.model_fields.keys()
