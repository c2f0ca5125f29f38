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


def trained_on_note(data: DataConfig, directories: list[Path]) -> str | None:
    """A sentence if an evaluation is on prompts that a model was trained on, as far as its run records that; None if not.

    Shares of one source are nested, so a larger one than the run's holds prompts of its training.

    Args:
        data: The prompts of the evaluation, of which those held out are used, or all with ``holdout: 0``.
        directories: The run directories of its models.

    Raises:
        ConfigError: A config.yaml cannot be read.
    """
    evaluated = data.holdout or 1.0
    for directory in directories:
        recorded = recorded_section(directory, "data")
        if recorded is None or not _sources(recorded.get("source", [])) & _sources(data.source):
            continue
        holdout = float(recorded.get("holdout", DataConfig.model_fields["holdout"].default))
        if evaluated > holdout + float(recorded.get("validation", 0.0)) + 1e-9:
            every = "all prompts" if data.holdout == 0 else f"data.holdout={data.holdout:g}"
            return (
                f"{directory} was trained with data.holdout={holdout:g}, and is evaluated on {every} of the same source: its "
                "model has seen some of these prompts in training."
            )
    return None


def _sources(given: str | list[str]) -> set[str]:
    """The files or presets of a source, files by their absolute paths."""
    names = [given] if isinstance(given, str) else given
    return {str(Path(name).resolve()) if Path(name).exists() else name for name in names}
