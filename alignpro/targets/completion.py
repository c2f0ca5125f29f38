"""A response that came as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alignpro.engine import Completion


@dataclass
class TextCompletion(Completion):
    """A response that came as text: from a server it has neither tokens nor log-probabilities."""

    text: str = ""
    """The response, stripped and without reasoning."""
    outcome: Literal["answered", "filtered", "overflow"] = "answered"
    """What happened to the request: the server answered, its content filter refused, or the prompt did not fit."""
    value: float | None = None
    """The reward of a response that is not scored: configured for what was filtered or did not fit."""
