"""House style: a complete, short answer, as a help text or a voice assistant needs it."""

from __future__ import annotations

from collections.abc import Sequence

from alignpro.data import Prompt
from alignpro.rewards.tasks.words import on_topic, words

INSTRUCTIONS = {
    "one_sentence": "Answer in one short sentence.",
    "thirty_words": "Answer in at most 30 words.",
    "briefly": "Briefly: {{ prompt }}",
}


def house_style(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Good is 8 to 40 words that end with a full stop, times the overlap with the prompt's content words.

    Fewer words hardly answer, more are not read, and without a full stop the answer was cut off; the overlap keeps a fixed
    phrase from being worth anything.
    """
    return [_score(prompt.text, response) for prompt, response in zip(prompts, responses, strict=True)]


def _score(prompt: str, response: str) -> float:
    fits = 8 <= len(words(response)) <= 40 and response.rstrip().endswith(".")
    return on_topic(prompt, response) if fits else 0.0
