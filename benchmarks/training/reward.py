"""The reward of every entrant: a cheap function of the response's text, so that the models dominate the time."""

from __future__ import annotations

from collections.abc import Sequence


def variety(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    """Return the share of distinct characters in each response."""
    return [len(set(response)) / max(1, len(response)) for response in responses]
