"""What takes part in the comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case
from benchmarks.kernels.problem import Problem
from benchmarks.kernels.shapes import Shape


class Outcome(NamedTuple):
    """What a forward pass gives."""

    value: Tensor
    """The loss (), the log-probabilities (N,), or the sampled tokens (N,)."""
    logprob: Tensor | None = None
    """(N,) of the sampled tokens, from those that give it."""
    entropy: Tensor | None = None
    """(N,) likewise."""


class Run(NamedTuple):
    """An entrant that computes the case."""

    forward: Callable[[Problem], Outcome]
    quantity: str
    """What it computes, and how, in a few words."""
    seeded: bool = False
    """Whether its samples depend on the problem's seeds alone, as the reference's do."""


class Skip(NamedTuple):
    """An entrant that does not, and why."""

    reason: str


class Setting(NamedTuple):
    """Where and on what the case runs."""

    device: torch.device
    dtype: torch.dtype
    shape: Shape


Prepare: TypeAlias = Callable[[Case, Setting], "Run | Skip"]


@dataclass(frozen=True)
class Entrant:
    """An implementation under a name."""

    name: str
    title: str
    prepare: Prepare
