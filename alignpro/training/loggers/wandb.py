"""Weights & Biases, which is optional."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from alignpro.config import RunConfig
from alignpro.errors import ConfigError, TrainingError
from alignpro.training.loggers.jsonl import log_errors


def import_wandb() -> ModuleType:
    """Import Weights & Biases.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "run.wandb_project needs Weights & Biases: pip install 'alignpro[wandb]', or leave the key out"
        ) from error
    module: ModuleType = wandb
    return module


def start_wandb(config: RunConfig, description: Mapping[str, Any]) -> Any:
    """Start a Weights & Biases run, or continue it after a resume: its id is stored beside the metrics.

    Args:
        config: The run directory and the project.
        description: The job's configuration as plain data.

    Raises:
        ConfigError: Weights & Biases is not installed.
        TrainingError: Weights & Biases returns an error, or the id cannot be written.
    """
    wandb = import_wandb()
    path = config.out / "wandb_id"
    with log_errors(path):
        if not path.is_file():
            path.write_text(uuid.uuid4().hex[:12])
        identity = path.read_text()
    try:
        return wandb.init(
            project=config.wandb_project, id=identity, resume="allow", dir=str(config.out), config=dict(description)
        )
    except wandb.errors.Error as error:
        raise TrainingError(
            f"Weights & Biases: {error}; log in with `wandb login`, set WANDB_MODE=offline, or leave run.wandb_project out"
        ) from error
