"""The reward of every entrant: a cheap function of the response's text, so that models are what is timed."""

from __future__ import annotations

from collections.abc import Sequence


def variety(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    """The share of a response's characters that are different ones."""
    return [len(set(response)) / max(1, len(response)) for response in responses]
