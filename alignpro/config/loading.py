"""Reading and writing configurations: layered YAML files, dotted overrides, interpolation."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from alignpro.config.commands import COMMANDS, fitting_commands
from alignpro.config.messages import explain
from alignpro.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=BaseModel)

StrPath: TypeAlias = str | os.PathLike[str]
ConfigSource: TypeAlias = ConfigT | Mapping[str, Any] | StrPath | Sequence[StrPath]
"""What `resolve_config` takes."""


def load_config(kind: type[ConfigT], arguments: Sequence[str]) -> ConfigT:
    """Merge YAML files and dotted overrides, left to right, and validate the result.

    Args:
        kind: The configuration to build.
        arguments: Paths of YAML files (``*.yaml``, ``*.yml``) and overrides (``section.key=value``); later ones win.
            Mappings are merged, lists and values are replaced; ``section.0.key=value`` changes an item of an existing
            list. A relative path of a Python file or a template is looked for beside the YAML file that names it, then in
            the working directory.

    Raises:
        ConfigError: A file is missing or is not a YAML mapping, a key is unknown, or a value is invalid; the message names
            it.
    """
    merged = OmegaConf.create({})
    for argument in arguments:
        merged = _layer(merged, argument)
    try:
        raw = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"configuration: {error}") from error
    return validate_config(kind, raw)


def resolve_config(kind: type[ConfigT], given: ConfigSource[ConfigT]) -> ConfigT:
    """Return a configuration that is given in one of several ways.

    Args:
        kind: The configuration to build.
        given: A configuration of this kind; a mapping of its sections, in which paths may be `Path` objects; the path of a
            YAML file; or a sequence of YAML files and overrides, as `load_config` takes them.

    Raises:
        ConfigError: As `load_config`; or it is the configuration of something else.
    """
    if isinstance(given, kind):
        return given
    if isinstance(given, BaseModel):
        raise ConfigError(f"configuration: expected a {kind.__name__}, got a {type(given).__name__}")
    if isinstance(given, Mapping):
        plain = _plain_paths(given)
        _refuse_missing(plain)
        return validate_config(kind, plain)
    arguments = [given] if isinstance(given, str | os.PathLike) else given
    return load_config(kind, [os.fspath(argument) for argument in arguments])


def validate_config(kind: type[ConfigT], raw: Any) -> ConfigT:
    """Validate a plain mapping against ``kind``; all problems are reported together, by key."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problems = [f"  {line}" for line in explain(kind, error)]
        if fitting := fitting_commands(kind, raw):
            own = next(f"`alignpro {name}`" for name, each in COMMANDS.items() if each is kind)
            others = " and ".join(f"`alignpro {name}`" for name in fitting)
            unknown = sorted(raw.keys() - kind.model_fields.keys())
            if unknown:
                raise ConfigError(
                    f"configuration: its sections fit {others}, not {own}, which has no {', '.join(unknown)}: use that "
                    "command, or another file"
                ) from error
            problems.append(f"  (as it is, it fits {others})")
        raise ConfigError("\n".join(["configuration:", *problems])) from error


def dump_config(config: BaseModel) -> str:
    """The resolved configuration as YAML, which `load_config` reads back to an equal configuration.

    Raises:
        ConfigError: A value is ``???``.
    """
    content = config.model_dump(mode="json")
    _refuse_missing(content)
    # Written by OmegaConf, because it quotes strings that its own reader would parse as numbers (`1e3`).
    return OmegaConf.to_yaml(OmegaConf.create(_escape(content)))


def _plain_paths(value: Any) -> Any:
    """Replace `Path` objects by strings."""
    if isinstance(value, Mapping):
        return {key: _plain_paths(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_paths(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


_OVERRIDE = re.compile(r"[\w.\[\]-]+=")
"""The beginning of an override; in a path, a slash precedes the equals sign, if there is one."""

_INDEX = re.compile(r"(\.|\[)\d+(\.|\]|\[|$)")
"""A list index within a key."""


def _layer(merged: DictConfig, argument: str) -> DictConfig:
    """Merge a file or an override on top; errors name the argument."""
    path = Path(argument)
    is_file = path.suffix in (".yaml", ".yml") and (path.is_file() or _OVERRIDE.match(argument) is None)
    where = f"configuration file {argument}" if is_file else f"argument {argument!r}"
    try:
        return _merge(merged, _load(path)) if is_file else _override(merged, argument)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not text in UTF-8: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _load(path: Path) -> DictConfig:
    if not path.is_file():
        raise FileNotFoundError("not found")
    loaded = OmegaConf.load(path)
    if not isinstance(loaded, DictConfig):
        raise ValueError("expected a mapping of keys at the top level")
    located = OmegaConf.create(_locate(OmegaConf.to_container(loaded), "", path))
    assert isinstance(located, DictConfig)  # because it was one
    return located


_FILE_KEYS = {
    "function",
    "environment",
    "loss",
    "advantage",
    "chat_template",
    "meta_prompt",
    "template",
    "rubric",
    "moves",
}
"""Keys whose values may name a file of the user's: code as ``file.py:name``, or a template."""


def _locate(value: Any, key: str, yaml_file: Path) -> Any:
    """Replace relative paths of files that lie beside a YAML file by paths from the working directory."""
    if isinstance(value, dict):
        return {name: _locate(each, str(name), yaml_file) for name, each in value.items()}
    if isinstance(value, list):
        return [_locate(each, key, yaml_file) for each in value]
    if key not in _FILE_KEYS or not isinstance(value, str):
        return value
    file, code, name = value.rpartition(".py:")
    file = f"{file}.py" if code else value
    beside = yaml_file.parent / file
    if Path(file).is_absolute() or not beside.is_file():
        return value
    return f"{beside}:{name}" if code else str(beside)


def _override(merged: DictConfig, argument: str) -> DictConfig:
    key, equals, value = argument.partition("=")
    if not equals or not key:
        raise ValueError("expected a .yaml file or an override of the form section.key=value")
    if not _INDEX.search(key):
        return _merge(merged, OmegaConf.from_dotlist([argument]))
    # A merge would replace the list by a mapping {0: …}.
    parsed = OmegaConf.from_dotlist([f"value={value}"])
    OmegaConf.update(merged, key, parsed._get_node("value"), merge=True, force_add=True)
    return merged


def _merge(below: DictConfig, above: DictConfig) -> DictConfig:
    try:
        merged = OmegaConf.merge(below, above)
    except TypeError as error:
        key = _clash(OmegaConf.to_container(below), OmegaConf.to_container(above))
        raise ValueError(f"{key}: a list cannot be merged with a mapping" if key else str(error)) from error
    assert isinstance(merged, DictConfig)  # because both inputs are
    return merged


def _clash(below: Any, above: Any) -> str | None:
    """The first key at which one side has a list and the other a mapping; None if there is none."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return "" if {type(below), type(above)} == {dict, list} else None
    for key in below.keys() & above.keys():
        deeper = _clash(below[key], above[key])
        if deeper is not None:
            return f"{key}.{deeper}".rstrip(".")
    return None


def _refuse_missing(value: Any, key: str = "") -> None:
    """Raise if a value is ``???``, for which OmegaConf has no escape: it reads it as a value that is missing."""
    below = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, each in below:
        _refuse_missing(each, f"{key}.{name}" if key else str(name))
    if value == MISSING:
        raise ConfigError(f"configuration: {key}: {MISSING} stands for a missing value in YAML; give another text")


def _escape(value: Any) -> Any:
    """Escape ``${`` in strings, so that it is not read as an interpolation."""
    if isinstance(value, dict):
        return {key: _escape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_escape(each) for each in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value
