"""What is asked and what is rewarded: questions for advice, and a reward for answers that enumerate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from alignpro.data import Prompt

TOPICS = (
    "sleeping better|saving money|learning to swim|a job interview|keeping a garden|cooking rice|writing a letter|"
    "running a meeting|moving house|buying a used car|studying for an exam|training a dog|cleaning a kitchen|"
    "a long flight|making friends|growing tomatoes|learning to draw|reading more|packing a suitcase|baking bread|"
    "a first marathon|speaking in public|fixing a bicycle|choosing a laptop|a rainy weekend|working from home|"
    "painting a room|hiking alone|a dinner for six|keeping a diary|learning chess|a healthy back|a quiet baby|"
    "selling a house|a small balcony|taking photos|raising chickens|a new language|an old computer|a sore throat"
)
"""Separated by bars."""
QUESTIONS = ("Give me some ideas about {}.", "What helps with {}?", "What should I know about {}?")
COMMAS = 8
"""That earn the whole reward."""


def questions() -> list[str]:
    """All prompts: each topic with one of the questions."""
    return [QUESTIONS[i % len(QUESTIONS)].format(topic) for i, topic in enumerate(TOPICS.split("|"))]


def write(path: Path, texts: Sequence[str]) -> None:
    """Write prompts as JSON Lines."""
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))


def commas(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """The commas of the response as a share of `COMMAS`, at most 1: a style that questions can ask for without saying so."""
    return [min(text.count(",") / COMMAS, 1.0) for text in responses]
