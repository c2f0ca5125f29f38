"""The reasoning that a model writes between think tags before its answer; it is no part of a rewrite or a response."""

from __future__ import annotations

from typing import NamedTuple


class Tags(NamedTuple):
    """The texts that open and close reasoning."""

    opening: str
    closing: str


TAGS = (Tags("<think>", "</think>"), Tags("[THINK]", "[/THINK]"), Tags("<seed:think>", "</seed:think>"))


def opened_reasoning(generation_prompt: str) -> Tags | None:
    """The tags of the reasoning that a generation prompt opens at its end, or None."""
    return next((tags for tags in TAGS if generation_prompt.rstrip().endswith(tags.opening)), None)


def without_reasoning(text: str, opened: Tags | None) -> str:
    """Return the text behind the reasoning at its beginning; empty if the reasoning is unfinished.

    Args:
        text: What the model wrote.
        opened: The tags of the reasoning that the generation prompt has opened already.
    """
    while tags := opened or next((tags for tags in TAGS if text.lstrip().startswith(tags.opening)), None):
        text, opened = text.partition(tags.closing)[2], None
    return text
