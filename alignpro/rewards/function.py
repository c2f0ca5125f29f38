"""A Python function as a reward, given by dotted path, by file, or from Python as itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignpro.config import FunctionRewardConfig
from alignpro.config.dotted_path import load_object
from alignpro.config.rewards import NOT_IMPORTABLE, function_name
from alignpro.data import Prompt
from alignpro.errors import ConfigError, RewardError
from alignpro.rewards.component import ConcurrentReward, Measurement, describe_prompt

_BATCH = ("prompts", "completions", "responses", "rewrites", "metadata")
"""Parameters that get one value per sample of the batch; other ones are columns of the data."""


class FunctionReward:
    """Calls a function once per batch, which returns one number per response, or None where it abstains.

    A function whose first two parameters may be any prompts and responses is called as
    ``fn(prompts: list[Prompt], responses: list[str], **params)``. One that has parameters as those of TRL, or that needs
    more parameters, is called by their names; see `NamedArguments`.

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
        self._path = path
        self._function: Callable[..., Any] = (
            load_object(path, "reward function") if isinstance(config.function, str) else config.function
        )
        self._params = config.params
        self._known_columns: dict[str, None] = {}
        self.is_async = any(map(inspect.iscoroutinefunction, (self._function, type(self._function).__call__)))
        self.name = config.name or path.rpartition(":")[2].rpartition("<locals>.")[2]
        try:
            signature = inspect.signature(self._function)
        except ValueError:  # a builtin may have no signature; errors then appear at the first call
            self._named = None
            return
        try:
            self._named = NamedArguments.of(signature, config.params)
        except TypeError as error:
            raise ConfigError(
                f"reward function {path}: it is called as fn(prompts, responses, **params) with params "
                f"{sorted(config.params)}, which its signature {signature} does not take: {error}; or by name, with "
                f"parameters such as {', '.join(_BATCH)} and columns of the data"
            ) from error

    @property
    def needs_columns(self) -> bool:
        """Whether it has parameters that must be columns of the data."""
        return self._named is not None and any(name not in _BATCH for name in self._named.required)

    def check_columns(self, prompts: Sequence[Prompt]) -> None:
        """Check that the data has the columns that the function requires; each call gets them, whatever its prompts have.

        Raises:
            ConfigError: No prompt has one of them.
        """
        self._known_columns |= _columns(prompts)
        if self._named is not None and prompts and (absent := self._named.absent_columns(_columns(prompts))):
            raise ConfigError(
                f"reward function {self._path}: its parameter {absent[0]!r} is neither in params nor a column of the data "
                f"(columns: {', '.join(_columns(prompts)) or 'none'}); give it in params, map a column with "
                f"data.columns.metadata.{absent[0]}, or give it a default"
            )

    def scorable(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """All prompts; see `check_columns`."""
        self.check_columns(prompts)
        return list(prompts)

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rewrites: Sequence[str] | None = None
    ) -> Measurement:
        """Call the function, which returns (N,) values. It gets copies of the lists, so it may modify them."""
        return Measurement(self.call(prompts, responses, rewrites))

    def call(self, prompts: Sequence[Prompt], responses: Sequence[str], rewrites: Sequence[str] | None) -> Any:
        """What the function returns: (N,) values, unchecked, or for an ``async def`` function an awaitable of them."""
        if self._named is None:
            return self._function(list(prompts), list(responses), **self._params)
        columns = self._known_columns | _columns(prompts)
        if absent := self._named.absent_columns(columns):
            raise RewardError(
                f"reward {self.name!r}: no prompt of a batch has {absent[0]!r} in its metadata, which the function takes: "
                f"give the parameter a default\n  for a batch that begins with {describe_prompt(prompts[0])}"
            )
        return self._function(**self._named.values(prompts, responses, rewrites, columns), **self._params)


class AsyncFunctionReward(ConcurrentReward):
    """Awaits an ``async def`` function, which is called as every other one.

    In a rollout it is called once per rewrite, as soon as the responses to that are there, unless it wants the whole batch.
    """

    def __init__(self, function: FunctionReward, whole_batch: bool = False) -> None:
        self.name = function.name
        self.by_row = not whole_batch
        self._function = function

    def scorable(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """All prompts; see `FunctionReward.check_columns`."""
        return self._function.scorable(prompts)

    async def measure(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rewrites: Sequence[str] | None
    ) -> Measurement:
        """Await the (N,) values."""
        return Measurement(await self._function.call(prompts, responses, rewrites))


@dataclass(frozen=True)
class NamedArguments:
    """The arguments of a function that is called by the names of its parameters, as TRL calls reward functions.

    ``completions`` or ``responses`` are the responses, as strings; ``rewrites`` the rewrites, or None without any;
    ``metadata`` the prompts' metadata; ``prompts`` the `Prompt` records or, for a function with ``completions``, the texts of
    the users' last turns. Every other name is a column of the data: one value per sample from the prompt's metadata, None
    where it has none.
    """

    names: tuple[str, ...]
    """Parameters that are not in the configuration's params."""
    required: tuple[str, ...]
    """Those that have no default."""
    takes_all: bool
    """Whether it takes any further columns (``**kwargs``)."""

    @classmethod
    def of(cls, signature: inspect.Signature, params: Mapping[str, Any]) -> NamedArguments | None:
        """The arguments of a function with this signature; None if it is to be called by position.

        Raises:
            TypeError: It can be called neither by position nor by name.
        """
        parameters = list(signature.parameters.values())
        by_name = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
        names = [each.name for each in by_name if each.name not in params]
        takes_all = any(each.kind == each.VAR_KEYWORD for each in parameters)
        unusual = {"completions", "rewrites", "metadata"} & set(names) or names[:1] == ["responses"]
        if not unusual and not (takes_all and {"prompts", "responses"} <= set(names)):
            try:
                signature.bind([], [], **params)
            except TypeError:
                if not takes_all and "responses" not in names:
                    raise
            else:
                return None
        required = [each.name for each in by_name if each.name in names and each.default is each.empty]
        signature.bind(
            **dict.fromkeys(required), **params
        )  # raises if it takes some only by position, or not all params
        return cls(tuple(names), tuple(required), takes_all)

    def absent_columns(self, columns: Container[str]) -> list[str]:
        """Required parameters that are none of these columns of the data."""
        return [name for name in self.required if name not in _BATCH and name not in columns]

    def values(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        rewrites: Sequence[str] | None,
        columns: Iterable[str],
    ) -> dict[str, Any]:
        """Name → argument, in new lists; ``columns`` are those of the data."""
        as_records = "responses" in self.names and "completions" not in self.names
        batch: dict[str, Any] = {
            "prompts": list(prompts) if as_records else [prompt.text for prompt in prompts],
            "completions": list(responses),
            "responses": list(responses),
            "rewrites": None if rewrites is None else list(rewrites),
            "metadata": [prompt.metadata for prompt in prompts],
        }
        given = {name: value for name, value in batch.items() if name in self.names}
        if self.takes_all:
            given = {name: batch[name] for name in ("prompts", "rewrites", "metadata")} | given
            given.setdefault("responses" if as_records else "completions", list(responses))
        taken = [name for name in columns if name not in _BATCH and (self.takes_all or name in self.names)]
        return given | {name: [prompt.metadata.get(name) for prompt in prompts] for name in taken}


def _columns(prompts: Sequence[Prompt]) -> dict[str, None]:
    """The names of the metadata of any of these prompts, in the order in which they occur."""
    return dict.fromkeys(name for prompt in prompts for name in prompt.metadata)
