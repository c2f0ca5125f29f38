"""A Python function as a reward, given by dotted path, by file, or from Python as itself."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import operator
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from alignpro.config import FunctionRewardConfig
from alignpro.config.rewards import NOT_IMPORTABLE, function_name
from alignpro.data import Prompt
from alignpro.errors import ConfigError
from alignpro.rewards.component import Measurement


class FunctionReward:
    """Calls ``fn(prompts: list[Prompt], responses: list[str], **params) -> list[float]`` once per batch.

    Raises:
        ConfigError: The function does not exist, or it does not accept these arguments.
    """

    def __init__(self, config: FunctionRewardConfig) -> None:
        path = function_name(config.function)
        self._function = load_function(path) if isinstance(config.function, str) else config.function
        self._params = config.params
        self.name = config.name or path.rpartition(":")[2].rpartition("<locals>.")[2]
        try:
            signature = inspect.signature(self._function)
        except ValueError:
            return  # a builtin may have no signature; errors then appear at the first call
        try:
            signature.bind([], [], **config.params)
        except TypeError as error:
            raise ConfigError(
                f"reward function {path}: it is called as fn(prompts, responses, **params) with params "
                f"{sorted(config.params)}, which its signature {signature} does not take: {error}"
            ) from error

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Measurement:
        """Call the function, which returns (N,) values. It gets copies of the lists, so it may modify them."""
        return Measurement(self._function(list(prompts), list(responses), **self._params))


def load_function(path: str) -> Callable[..., Any]:
    """Load the function ``package.module:function`` or ``path/to/file.py:function``.

    Raises:
        ConfigError: The path has another form, the module or function does not exist, or importing the module fails.
    """
    if path.startswith(NOT_IMPORTABLE):
        raise ConfigError(
            f"reward function {path.removeprefix(NOT_IMPORTABLE)}: was given from Python, where no configuration file can "
            "name it: give the same function to alignpro.train again, or move it to a file and name that"
        )
    where, colon, attribute = path.rpartition(":")
    if not colon or not where or not attribute:
        raise ConfigError(
            f"reward function {path!r}: expected package.module:function or path/to/file.py:function, with one colon"
        )
    module = _from_file(path, Path(where)) if where.endswith(".py") else _from_package(path, where)
    try:
        function = operator.attrgetter(attribute)(module)
    except AttributeError as error:
        names = sorted(name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_")
        raise ConfigError(
            f"reward function {path}: {where} has no {attribute!r}; its functions: {', '.join(names) or 'none'}"
        ) from error
    if not callable(function):
        raise ConfigError(f"reward function {path}: {attribute!r} is a {type(function).__name__}, not a function")
    return function


def _from_package(path: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"reward function {path}: there is no module {error.name!r} on the import path; "
                "install its package, or give the file: path/to/file.py:function"
            ) from error
        raise _broken(path, error) from error
    except Exception as error:
        raise _broken(path, error) from error


def _from_file(path: str, file: Path) -> ModuleType:
    if not file.is_file():
        raise ConfigError(f"reward function {path}: file {file.absolute()} not found")
    # The module is registered because dataclasses and pickle look it up by name. The name is a hash of the path, so that
    # two files may have the same stem.
    name = f"alignpro_reward_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"reward function {path}: {file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _broken(path, error) from error
    return module


def _broken(path: str, error: Exception) -> ConfigError:
    return ConfigError(f"reward function {path}: importing it raised {type(error).__name__}: {error}")
