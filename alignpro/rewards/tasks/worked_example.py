"""Worked example: an answer that shows what it means."""

from __future__ import annotations

import re
from collections.abc import Sequence

from alignpro.data import Prompt
from alignpro.rewards.tasks.words import on_topic, words

INSTRUCTIONS = {
    "for_example": 'Give an example. Start it with "For example,".',
    "begin": 'Begin your answer with "For example,".',
    "concrete": "Explain with a concrete example.",
}

_ANNOUNCED = re.compile(
    r"\b(for example|for instance|an example (of|is|would be)|here('|’)s an example|here is an example)\b",
    re.IGNORECASE,
)
_ENOUGH = 8
"""Words of an example that is spelt out."""


def worked_example(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Good is an example that is announced and has at least 8 words, times the overlap with the prompt's content words."""
    return [_score(prompt.text, response) for prompt, response in zip(prompts, responses, strict=True)]


def _score(prompt: str, response: str) -> float:
    announced = _ANNOUNCED.search(response)
    if announced is None or len(words(response[announced.end() :])) < _ENOUGH:
        return 0.0
    return on_topic(prompt, response)
