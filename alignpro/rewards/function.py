"""A Python function as a reward, given by dotted path, by file, or from Python as itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from alignpro.config import FunctionRewardConfig
from alignpro.config.dotted_path import load_object
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
        if path.startswith(NOT_IMPORTABLE) and isinstance(config.function, str):
            raise ConfigError(
                f"reward function {path.removeprefix(NOT_IMPORTABLE)}: was given from Python, where no configuration file can "
                "name it: give the same function to alignpro.train again, or move it to a file and name that"
            )
        self._function = load_object(path, "reward function") if isinstance(config.function, str) else config.function
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
