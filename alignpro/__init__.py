"""Align-Pro: reinforcement learning of prompt rewriters for frozen language models.

The front door for Python: `train` runs a training job, `evaluate` compares trained models, and `Rewriter` uses a trained
prompter. Each is imported when it is first used, since torch takes seconds to import. Everything else reads this package
only for its version.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignpro.environments.rewriter import Rewriter
    from alignpro.evaluation.evaluate import evaluate
    from alignpro.training.jobs import train

__version__ = "0.1.0"

__all__ = ["Rewriter", "evaluate", "train"]

_MODULES = {
    "Rewriter": "alignpro.environments.rewriter",
    "evaluate": "alignpro.evaluation.evaluate",
    "train": "alignpro.training.jobs",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
