"""Python functions and classes of the user's own, named in the configuration by module or by file."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from alignpro.errors import ConfigError

T = TypeVar("T")


def load_class(path: str, base: type[T], what: str) -> type[T]:
    """Load a class of the user's own that extends one of this project's.

    Args:
        path: As for `load_object`.
        base: The class that it must extend.
        what: The configuration key, for messages.

    Raises:
        ConfigError: As `load_object`, or it does not extend ``base``.
    """
    loaded = load_object(path, what, "class")
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        raise ConfigError(f"{what} {path}: it must be a subclass of {base.__module__}.{base.__qualname__}")
    return loaded


def load_object(path: str, what: str, kind: str = "function") -> Callable[..., Any]:
    """Load the function or class ``package.module:name`` or ``path/to/file.py:name``.

    Args:
        path: The module or file, and the name in it.
        what: What it is, for messages: ``reward function``, ``objective.loss``.
        kind: ``function`` or ``class``.

    Raises:
        ConfigError: The path has another form, the module or function does not exist, or importing the module fails.
    """
    where, colon, attribute = path.rpartition(":")
    if not colon or not where or not attribute:
        raise ConfigError(f"{what} {path!r}: expected package.module:{kind} or path/to/file.py:{kind}, with one colon")
    module = (
        _from_file(f"{what} {path}", Path(where)) if where.endswith(".py") else _from_package(f"{what} {path}", where)
    )
    try:
        function = operator.attrgetter(attribute)(module)
    except AttributeError as error:
        is_kind = inspect.isfunction if kind == "function" else inspect.isclass
        names = sorted(name for name, value in vars(module).items() if is_kind(value) and name[0] != "_")
        several = {"function": "functions", "class": "classes"}[kind]
        raise ConfigError(
            f"{what} {path}: {where} has no {attribute!r}; its {several}: {', '.join(names) or 'none'}"
        ) from error
    if not callable(function):
        raise ConfigError(f"{what} {path}: {attribute!r} is a {type(function).__name__}, not a {kind}")
    return function


def _from_package(where: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{where}: there is no module {error.name!r} on the import path; "
                "install its package, or give the file: path/to/file.py:name"
            ) from error
        raise _broken(where, error) from error
    except Exception as error:
        raise _broken(where, error) from error


def _from_file(where: str, file: Path) -> ModuleType:
    if not file.is_file():
        beside = "" if file.is_absolute() else ", nor beside the YAML file that names it"
        raise ConfigError(f"{where}: file {file.absolute()} not found{beside}")
    # The module is registered because dataclasses and pickle look it up by name. The name is a hash of the path, so that
    # two files may have the same stem.
    name = f"alignpro_user_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{where}: {file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _broken(where, error) from error
    return module


def _broken(where: str, error: Exception) -> ConfigError:
    return ConfigError(f"{where}: importing it raised {type(error).__name__}: {error}")
