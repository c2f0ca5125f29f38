"""Numbered list: an answer as items that can be ticked off and referred to by number."""

from __future__ import annotations

import re
from collections.abc import Sequence

from alignpro.data import Prompt
from alignpro.rewards.tasks.words import on_topic

INSTRUCTIONS = {
    "numbered": "Give your answer as a numbered list.",
    "steps": "Answer as a numbered list of short steps: 1. 2. 3.",
    "three": "Name three things, each in one short line, numbered 1 to 3.",
}

_ITEM = re.compile(r"^\W*(\d{1,9})[.):]\W*\w", re.MULTILINE)
_ENOUGH = 3


def numbered_list(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Good is three items, numbered from 1 in order on lines of their own, times the overlap with the prompt's content words.

    One or two items are worth a third and two thirds. Further ones are worth nothing more, so that an answer need not be
    long; the overlap keeps a bare list of numbers from being worth anything.
    """
    return [_score(prompt.text, response) for prompt, response in zip(prompts, responses, strict=True)]


def _score(prompt: str, response: str) -> float:
    items = 0
    for number in _ITEM.findall(response):
        items += int(number) == items + 1
    return min(items, _ENOUGH) / _ENOUGH * on_topic(prompt, response)
