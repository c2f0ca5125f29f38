"""Plain words: an answer that a child, or a reader of a foreign language, understands."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from alignpro.data import Prompt
from alignpro.rewards.tasks.words import on_topic, sentences, words

INSTRUCTIONS = {
    "child": "Explain it to a five-year-old child, in simple words and short sentences.",
    "simple": "Use simple words.",
    "short_sentences": "Write very short sentences with easy words.",
}

_LONG_WORD = 8
"""Letters from which a word counts as long."""
_LONG_SHARE = 0.3
"""Share of long words at which a text is worth nothing."""
_SHORT, _LONG = 10.0, 25.0
"""Words a sentence up to which it is easy, and from which it is worth nothing."""


def plain_words(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Good is few long words, times short sentences, times the overlap with the prompt's content words.

    The shares of readability formulas, which multiply the length of words and of sentences, each mapped to [0, 1]; less than
    8 words, or a word that is repeated next to itself, are worth nothing.
    """
    return [_score(prompt.text, response) for prompt, response in zip(prompts, responses, strict=True)]


def _score(prompt: str, response: str) -> float:
    every = words(response)
    if len(every) < 8 or any(one == other for one, other in pairwise(every)):
        return 0.0
    share = sum(len(word) >= _LONG_WORD for word in every) / len(every)
    easy_words = max(0.0, 1 - share / _LONG_SHARE)
    per_sentence = len(every) / len(sentences(response))
    easy_sentences = min(1.0, max(0.0, (_LONG - per_sentence) / (_LONG - _SHORT)))
    return easy_words * easy_sentences * on_topic(prompt, response)
