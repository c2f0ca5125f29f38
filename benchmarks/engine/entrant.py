"""What takes part in the comparison."""

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
    """Sequences that run at once, of those entrants that can be told."""
    seed: int


@dataclass(frozen=True)
class Generated:
    """What came of a round."""

    tokens: dict[str, int]
    """Model → tokens that it generated."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the entrant tells of itself."""


Run: TypeAlias = Callable[[int], Generated]
"""Round → what was generated; nothing computed in an earlier round may be used but for compiled code."""


@dataclass(frozen=True)
class Entrant:
    """A way to generate under a name; ``prepare`` raises where it cannot."""

    name: str
    prepare: Callable[[Case, Inputs, Setting], Run]


def make_models(case: Case, setting: Setting) -> dict[str, PreTrainedModel]:
    """An entrant's own models: the same random weights for all, since some change the model that they are given."""
    return {
        name: make_model(
            shape, context=case.context, seed=setting.seed + i, dtype=setting.dtype, device=setting.device
        ).requires_grad_(False)
        for i, (name, shape) in enumerate(case.shapes.items())
    }
