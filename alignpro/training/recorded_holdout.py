"""How a run held prompts out, as its directory records: what resuming it and evaluating its model must keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from alignpro.config import DataConfig
from alignpro.errors import ConfigError

_BEFORE = "conversation"
"""What runs hashed that do not record it: those of versions without the key ``data.holdout_by``."""


def recorded_section(directory: Path, name: str) -> dict[str, Any] | None:
    """A section of a run directory's config.yaml as it was written; None if it has none.

    Raises:
        ConfigError: It cannot be read.
    """
    path = directory / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    section = content.get(name) if isinstance(content, dict) else None
    return section if isinstance(section, dict) else None


def recorded_holdout(directory: Path) -> str | None:
    """``data.holdout_by`` of a run directory; None if it holds no configuration with data.

    Raises:
        ConfigError: Its config.yaml cannot be read.
    """
    data = recorded_section(directory, "data")
    return None if data is None else str(data.get("holdout_by", _BEFORE))


def keep_holdout(data: DataConfig, directories: list[Path]) -> DataConfig:
    """The data's configuration with the ``holdout_by`` that run directories record, unless it was given.

    Raises:
        ConfigError: The directories record different ones, or a config.yaml cannot be read.
    """
    if "holdout_by" in data.model_fields_set or data.holdout == 0:
        return data
    recorded = {path: kind for path in directories if (kind := recorded_holdout(path)) is not None}
    if len(set(recorded.values())) > 1:
        found = ", ".join(f"{path}: {kind}" for path, kind in recorded.items())
        raise ConfigError(
            f"data.holdout_by: the runs held prompts out in different ways ({found}), so no prompt is sure to be held out of "
            "all: name data.source with prompts that none was trained on and holdout: 0, or choose one"
        )
    return data.model_copy(update={"holdout_by": next(iter(recorded.values()))}) if recorded else data
