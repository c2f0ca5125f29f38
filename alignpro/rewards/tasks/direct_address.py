"""Direct address: an answer that speaks to the reader, as guides and coaches do."""

from __future__ import annotations

from collections.abc import Sequence

from alignpro.data import Prompt
from alignpro.rewards.tasks.words import on_topic, sentences, words

INSTRUCTIONS = {
    "you": 'Speak to the reader directly, as "you".',
    "advice": "Tell me what you would advise me to do.",
    "imagine": 'Begin with "You" and give me personal advice.',
}

_YOU = {"you", "your", "yours", "yourself", "you're", "you'll", "you've", "you'd"}


def direct_address(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Good is "you" in every sentence, times the overlap with the prompt's content words; half of them are worth half."""
    return [_score(prompt.text, response) for prompt, response in zip(prompts, responses, strict=True)]


def _score(prompt: str, response: str) -> float:
    parts = sentences(response)
    if not parts:
        return 0.0
    addressed = sum(any(word.lower().replace("’", "'") in _YOU for word in words(part)) for part in parts)
    return addressed / len(parts) * on_topic(prompt, response)
