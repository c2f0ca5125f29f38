"""The interface of the entrants in the comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel

from benchmarks.engine.cases import Case, Inputs
from benchmarks.models import make_model


@dataclass(frozen=True)
class Setting:
    """Where and how a case runs."""

    device: torch.device
    dtype: torch.dtype
    max_batch: int
    """Maximum number of running sequences, for entrants with such an option."""
    seed: int


@dataclass(frozen=True)
class Generated:
    """The result of a round."""

    tokens: dict[str, int]
    """Model → number of tokens that it generated."""
    details: dict[str, Any] = field(default_factory=dict)
    """Statistics reported by the entrant."""


Run: TypeAlias = Callable[[int], Generated]
"""Round → what was generated; nothing from earlier rounds may be reused except compiled code."""


@dataclass(frozen=True)
class Entrant:
    """A named generation method; ``prepare`` raises if it does not support a case."""

    name: str
    prepare: Callable[[Case, Inputs, Setting], Run]


def make_models(case: Case, setting: Setting) -> dict[str, PreTrainedModel]:
    """Create an entrant's own copy of the models, with the same random weights for all, since some modify their model."""
    return {
        name: make_model(
            shape, context=case.context, seed=setting.seed + i, dtype=setting.dtype, device=setting.device
        ).requires_grad_(False)
        for i, (name, shape) in enumerate(case.shapes.items())
    }
