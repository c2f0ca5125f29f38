"""The points of a sweep: the values of its keys, and the experiment that each is."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignpro.config import ExperimentConfig, RangeConfig, SweepConfig, validate_config
from alignpro.errors import ConfigError

_LONGEST_NAME = 100


@dataclass(frozen=True)
class Point:
    """Values of the keys that concern a method."""

    name: str
    """Of its directory; it depends on the values alone, so that a sweep can be extended."""
    label: str
    """Of the report."""
    values: Mapping[str, Any]
    """Dotted key → value."""
    config: ExperimentConfig
    """The experiment with these values."""


def points_of(config: SweepConfig) -> dict[str, list[Point]]:
    """Swept method → its points, each once: values of keys that do not concern it make no difference.

    Raises:
        ConfigError: A value is invalid; the message names the point.
    """
    drawn = _grid(config) if config.sweep.search == "grid" else _draws(config)
    short = _short_keys(list(config.sweep.parameters))
    found: dict[str, list[Point]] = {}
    for name in config.swept_methods:
        points: dict[str, Point] = {}
        for values in drawn:
            own = {key: value for key, value in values.items() if config.concerned(key, name)}
            point = _name(own, short)
            if own and point not in points:
                points[point] = Point(point, _label(own, short), own, _at(config, own, point))
        found[name] = list(points.values())
    return found


def _grid(config: SweepConfig) -> list[dict[str, Any]]:
    axes = {
        key: [each.at(i / ((each.count or 2) - 1)) for i in range(each.count or 2)]
        if isinstance(each, RangeConfig)
        else each
        for key, each in config.sweep.parameters.items()
    }
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _draws(config: SweepConfig) -> list[dict[str, Any]]:
    """Independent draws: that of a point and key depends on the seed, the number of the point and the key alone."""
    sweep = config.sweep
    points = []
    for i in range(sweep.points or 0):
        values = {}
        for key, each in sweep.parameters.items():
            rng = random.Random(f"{sweep.seed}/{i}/{key}")
            values[key] = each.at(rng.random()) if isinstance(each, RangeConfig) else rng.choice(each)
        points.append(values)
    return points


def _at(config: SweepConfig, values: Mapping[str, Any], name: str) -> ExperimentConfig:
    sections = config.model_dump(mode="json", exclude={"sweep"})
    for key, value in values.items():
        *path, last = key.split(".")
        section = sections
        for part in path:
            below = section.setdefault(part, {})
            if not isinstance(below, dict):
                raise ConfigError(f"sweep.parameters.{key}: {part} is not a section")
            section = below
        section[last] = value
    try:
        return validate_config(ExperimentConfig, sections)
    except ConfigError as error:
        raise ConfigError(f"point {name}: {error}") from error


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Key → the shortest ending of it that is no other's, at whole parts."""
    short = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = [each for each in keys if each != key]
        short[key] = next((end for end in endings if not any(f".{each}".endswith(f".{end}") for each in others)), key)
    return short


def _label(values: Mapping[str, Any], short: Mapping[str, str]) -> str:
    return ", ".join(f"{short[key]}={_shown(value)}" for key, value in values.items())


def _name(values: Mapping[str, Any], short: Mapping[str, str]) -> str:
    plain = "_".join(f"{short[key]}={_shown(value)}" for key, value in values.items())
    name = re.sub(r"[^\w.=+-]+", "-", plain)
    if name == plain and len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    return f"{name[:_LONGEST_NAME]}-{digest}"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
