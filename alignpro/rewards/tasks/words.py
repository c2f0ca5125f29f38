"""Words and sentences of a text, and how much a response is about what the prompt is about."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_SENTENCE_END = re.compile(r"[.!?…]+(?:\s|$)|\n+")

_FUNCTION_WORDS = frozenset(
    _WORD.findall(
        "a about after all also an and any are as at be because been before being between but by can could did do does each "
        "either every following for from give had has have he her here him his how i if in into is it its just let list make "
        "many may me might more most much must my no not of on one only or other our out over own please she should so some "
        "such tell than that the their them then there these they this those through to under up us very was we were what "
        "when where which while who whom whose why will with would write yes you your"
    )
)

_ENOUGH = 3
"""Shared content words that make a response fully on topic: short prompts have few, and paraphrases drop some."""


def words(text: str) -> list[str]:
    """The words of a text; a number is one, and so is what a hyphen or an apostrophe joins."""
    return _WORD.findall(text)


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text that have a word."""
    return [part.strip() for part in _SENTENCE_END.split(text) if words(part)]


def content_words(text: str) -> set[str]:
    """The words of a text that carry its subject, in lower case: neither function words nor single characters."""
    lowered = {word.lower() for word in words(text)}
    return {word for word in lowered if len(word) > 1 and word not in _FUNCTION_WORDS}


def on_topic(prompt: str, response: str) -> float:
    """How much a response is about the prompt, in [0, 1]: shared content words, of three or of all that the prompt has.

    A prompt without content words asks for none: 1.
    """
    subject = content_words(prompt)
    needed = min(_ENOUGH, len(subject))
    return 1.0 if needed == 0 else min(needed, len(subject & content_words(response))) / needed
