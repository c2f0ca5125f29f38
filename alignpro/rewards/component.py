"""What a part of the reward is, and how its answer is checked before it counts."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Protocol

import numpy as np
import torch

from alignpro.data.prompt import Prompt
from alignpro.errors import RewardError


@dataclass
class Measurement:
    """What a component says about N rows."""

    values: list[float]
    """(N,) the component's own scores, before weights."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """Name -> (N,): whatever else it noticed, such as which inputs it had to truncate."""


class Reward(Protocol):
    """One component of r*(x, y)."""

    name: str

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Measurement:
        """Score N responses against the ORIGINAL prompts, row by row."""
        ...


def guarded_call(what: str, prompts: Sequence[Prompt], call: Callable[[], Measurement]) -> Measurement:
    """Run a component and check what it returns.

    Args:
        what: What messages call the component, such as ``reward 'helpful'``.
        prompts: The (N,) prompts that it scores, N ≥ 1.
        call: The component, its arguments bound.

    Raises:
        RewardError: It raised, or returned the wrong count, something that is no number, NaN or infinity. The message
            names the component and the prompt: for a bad value the one it stands beside, otherwise the first of the
            batch (a function may have side effects, so it is not called again to find the row).
    """
    try:
        measured = call()
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(
            f"{what} raised {type(error).__name__}: {error}{_where(error)}\n"
            f"  in a batch of {len(prompts)} that begins with {describe_prompt(prompts[0])}"
        ) from error
    checked = {name: checked_values(f"{what}: metric {name!r}", prompts, v) for name, v in measured.metrics.items()}
    return Measurement(checked_values(what, prompts, measured.values), checked)


def checked_values(what: str, prompts: Sequence[Prompt], values: Any) -> list[float]:
    """One finite float a prompt, out of a list, tuple, array or tensor of real numbers.

    Raises:
        RewardError: See `guarded_call`.
    """
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
    return [_number(what, prompt, value) for prompt, value in zip(prompts, values, strict=True)]


def describe_prompt(prompt: Prompt) -> str:
    """Where a prompt comes from, its id and the first 200 characters of its text."""
    text = prompt.text if len(prompt.text) <= 200 else prompt.text[:200] + "…"
    return f"prompt {prompt.id} ({prompt.source or 'source unknown'}): {text!r}"


def _number(what: str, prompt: Prompt, value: Any) -> float:
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.ndim == 0):
        value = value.item()
    if not isinstance(value, Real):
        raise RewardError(f"{what} returned {value!r}, which is not a number\n  for {describe_prompt(prompt)}")
    try:
        number = float(value)
    except OverflowError:  # an int beyond the floats
        number = math.inf
    if not math.isfinite(number):
        raise RewardError(f"{what} returned {number}, expected a finite number\n  for {describe_prompt(prompt)}")
    return number


def _where(error: BaseException) -> str:
    """File and line of the innermost frame: where the user's code went wrong."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""
