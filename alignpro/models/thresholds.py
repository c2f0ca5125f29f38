"""The lengths at which a model begins to compute something else: windows, chunks, the end of its original context.

An error beyond such a length shows in no short sequence. So a model is tried with each length lowered to a few tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

ORIGINAL_CONTEXT = "original_max_position_embeddings"
"""Beyond this length a rotary embedding may have other frequencies, for all tokens of a sequence."""
_NAMES = (
    ORIGINAL_CONTEXT,
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "window_size",
    "attention_chunk_size",
    "floor_scale",
    "keep_window_size",
    "index_topk",
)
_OF_POSITIONS = (ORIGINAL_CONTEXT, "floor_scale")


@dataclass(frozen=True)
class Threshold:
    """A length that a configuration names."""

    name: str
    value: int
    """In tokens."""

    @property
    def of_positions(self) -> bool:
        """Whether the position of a token decides, and not its distance from another."""
        return self.name in _OF_POSITIONS


def thresholds(config: PreTrainedConfig) -> list[Threshold]:
    """Return the lengths that a configuration names and that a sequence of the model's context can exceed."""
    context = getattr(config, "max_position_embeddings", None)
    found = dict.fromkeys(
        Threshold(name, values[name])
        for values in _sections(config)
        for name in _NAMES
        if isinstance(values.get(name), int) and values[name] > 0
    )
    return [each for each in found if not isinstance(context, int) or each.value < context]


@contextmanager
def lowered(model: Any, threshold: Threshold, value: int) -> Iterator[None]:
    """Lower a length of a transformers model within the context, in its configuration and in its modules."""
    modules: list[dict[str, Any]] = [vars(module) for module in model.modules() if isinstance(module, nn.Module)]
    places = [
        values
        for values in (*_sections(model.config.get_text_config()), *modules)
        if values.get(threshold.name) == threshold.value
    ]
    try:
        for values in places:
            values[threshold.name] = value
        yield
    finally:
        for values in places:
            values[threshold.name] = threshold.value


def _sections(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The dictionaries that hold a configuration's values: its own, and those of its rotary embeddings."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [vars(config), *([rope, *(each for each in rope.values() if isinstance(each, dict))])]
