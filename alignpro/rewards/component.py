"""The interface of a reward component, and the validation of its results."""

from __future__ import annotations

import math
import os
import traceback
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from alignpro.data import Prompt
from alignpro.errors import BudgetError, ConfigError, EndpointError, LedgerError, PeerError, RewardError

LARGEST = float(np.finfo(np.float32).max)
"""Of a score: rewards are float32."""


@dataclass
class Measurement:
    """The result of a component for N rows."""

    values: list[float | None]
    """(N,) the component's own scores, before weights; None where it abstains."""
    metrics: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    """Name -> (N,): additional metrics, such as which inputs were truncated; None where there is nothing to measure."""


class Reward(Protocol):
    """One component of r*(x, y)."""

    name: str

    def scorable(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts to which it can score responses.

        Raises:
            ConfigError: The data lacks what it needs.
        """

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rewrites: Sequence[str] | None = None
    ) -> Measurement:
        """Score N responses against the ORIGINAL prompts, row by row; ``rewrites`` led to them, if there are any."""
        ...


class ConcurrentReward(ABC):
    """One component of r*(x, y) that waits, for a server as a rule: those of one reward wait at the same time."""

    name: str
    by_row: bool = False
    """Whether it may be asked about some rows before the others are there: what it measures of a row, and what it sends for
    that, must then not depend on the rows that it is asked about together."""

    @abstractmethod
    def scorable(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """As `Reward.scorable`."""

    @abstractmethod
    async def measure(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rewrites: Sequence[str] | None
    ) -> Measurement:
        """Score N responses as `Reward` does, on the event loop of the reward's own thread."""


def guarded_call(what: str, prompts: Sequence[Prompt], call: Callable[[], Measurement]) -> Measurement:
    """Run a component and check its result.

    Args:
        what: Name of the component in messages, such as ``reward 'helpful'``.
        prompts: The (N,) prompts to score, N ≥ 1.
        call: The component with its arguments bound.

    Raises:
        RewardError: The component raised, or returned the wrong number of values, NaN, infinity or something that is not
            a number. The message names the component and a prompt: the one with the bad value, or else the first of the
            batch (a function may have side effects, so it is not called again to find the row).
        EndpointError: A server that it asks cannot be used.
        BudgetError: What it asks a server could exceed the budget.
    """
    directory = Path.cwd()
    try:
        with _errors_named(what, prompts):
            measured = call()
    finally:
        os.chdir(directory)  # code that grades may have changed it, and the run's paths are relative
    return _checked(what, prompts, measured)


async def guarded_await(
    what: str, prompts: Sequence[Prompt], measure: Callable[[], Awaitable[Measurement]]
) -> Measurement:
    """Await a component and check its result, as `guarded_call`."""
    with _errors_named(what, prompts):
        measured = await measure()
    return _checked(what, prompts, measured)


@contextmanager
def server_errors_named(what: str) -> Iterator[None]:
    """Let the error of a server say which component asked it."""
    try:
        yield
    except EndpointError as error:
        raise EndpointError(f"{what}: {error}") from error


_AS_THEY_ARE = (RewardError, EndpointError, BudgetError, LedgerError, ConfigError, PeerError)
"""Errors that say what to do, of a component and of the books that its requests pass."""


@contextmanager
def _errors_named(what: str, prompts: Sequence[Prompt]) -> Iterator[None]:
    try:
        with server_errors_named(what):
            yield
    except _AS_THEY_ARE:
        raise
    except (Exception, SystemExit) as error:  # code that grades may end its process
        raise RewardError(
            f"{what} raised {type(error).__name__}: {error}{_where(error)}\n"
            f"  in a batch of {len(prompts)} that begins with {describe_prompt(prompts[0])}"
        ) from error


def _checked(what: str, prompts: Sequence[Prompt], measured: Measurement) -> Measurement:
    metrics = {name: checked_scores(f"{what}: metric {name!r}", prompts, v) for name, v in measured.metrics.items()}
    return Measurement(checked_scores(what, prompts, measured.values), metrics)


def checked_values(what: str, prompts: Sequence[Prompt], values: Any) -> list[float]:
    """Convert a list, tuple, array or tensor of real numbers to one finite float per prompt.

    Raises:
        RewardError: See `guarded_call`.
    """
    rows = zip(prompts, _one_each(what, prompts, values), strict=True)
    return [_number(what, prompt, value) for prompt, value in rows]


def checked_scores(what: str, prompts: Sequence[Prompt], values: Any) -> list[float | None]:
    """As `checked_values`, but with None where a component abstains."""
    rows = zip(prompts, _one_each(what, prompts, values), strict=True)
    return [None if value is None else _number(what, prompt, value) for prompt, value in rows]


def _one_each(what: str, prompts: Sequence[Prompt], values: Any) -> list[Any] | tuple[Any, ...]:
    if isinstance(values, np.ndarray | torch.Tensor):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"{what} returned {type(values).__name__}, expected a list of {len(prompts)} numbers\n"
            f"  for a batch that begins with {describe_prompt(prompts[0])}"
        )
    if len(values) != len(prompts):
        raise RewardError(
            f"{what} returned {len(values)} values for {len(prompts)} responses: it must return one each, in order\n"
            f"  for a batch that begins with {describe_prompt(prompts[0])}"
        )
    return values


def describe_prompt(prompt: Prompt) -> str:
    """Describe a prompt by its id, its source and the first 200 characters of its text."""
    text = prompt.text if len(prompt.text) <= 200 else prompt.text[:200] + "…"
    return f"prompt {prompt.id} ({prompt.source or 'source unknown'}): {text!r}"


def _number(what: str, prompt: Prompt, value: Any) -> float:
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.ndim == 0):
        value = value.item()
    if not isinstance(value, Real):
        raise RewardError(f"{what} returned {value!r}, which is not a number\n  for {describe_prompt(prompt)}")
    try:
        number = float(value)
    except OverflowError:  # an int too large for a float
        number = math.inf
    if not abs(number) <= LARGEST:
        expected = (
            f"one of at most {LARGEST:.3g}, the largest in float32" if math.isfinite(number) else "a finite number"
        )
        raise RewardError(f"{what} returned {number}, expected {expected}\n  for {describe_prompt(prompt)}")
    return number


def _where(error: BaseException) -> str:
    """File and line of the innermost frame, where the user's code failed."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""
