"""The interface of the entrants in the comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case
from benchmarks.kernels.problem import Problem
from benchmarks.kernels.shapes import Shape


class Outcome(NamedTuple):
    """The result of a forward pass."""

    value: Tensor
    """The loss (), the log-probabilities (N,), or the sampled tokens (N,)."""
    logprob: Tensor | None = None
    """(N,) of the sampled tokens, if the entrant returns it."""
    entropy: Tensor | None = None
    """(N,) likewise."""


class Run(NamedTuple):
    """An entrant prepared for a case."""

    forward: Callable[[Problem], Outcome]
    quantity: str
    """A short description of what it computes and how."""
    seeded: bool = False
    """Whether its samples depend only on the problem's seeds, as the reference's do."""


class Setting(NamedTuple):
    """The device, dtype and shape of a case."""

    device: torch.device
    dtype: torch.dtype
    shape: Shape


@dataclass(frozen=True)
class Entrant:
    """A named implementation; ``prepare`` raises `SkippedError` for a case that it does not run."""

    name: str
    title: str
    prepare: Callable[[Case, Setting], Run]
