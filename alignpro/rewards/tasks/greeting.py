"""Greeting: an answer that opens in a friendly way, as a support desk's does, and then speaks of the subject."""

from __future__ import annotations

import re
from collections.abc import Sequence

from alignpro.data import Prompt
from alignpro.rewards.tasks.words import on_topic

INSTRUCTIONS = {
    "hello": 'Begin your answer with "Hello!" and be friendly.',
    "greet": "Greet me first, then answer.",
    "tone": "Answer in a friendly, warm tone.",
}

_GREETING = re.compile(r"\W*(hello|hi|hey|greetings|welcome|good (morning|afternoon|evening|day))\b", re.IGNORECASE)


def greeting(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Good is a greeting as the first word, times the overlap of what follows with the prompt's content words.

    The overlap keeps a greeting that answers nothing, which small models write readily, from being worth anything.
    """
    return [_score(prompt.text, response) for prompt, response in zip(prompts, responses, strict=True)]


def _score(prompt: str, response: str) -> float:
    opening = _GREETING.match(response)
    return 0.0 if opening is None else on_topic(prompt, response[opening.end() :])
