"""Question or request: a question is answered in a sentence, what is asked to be done is laid out as a numbered list.

Prompts of both kinds are common, so each fixed instruction serves about half of them, and a prompter has to tell them apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from alignpro.data import Prompt
from alignpro.rewards.tasks.house_style import house_style
from alignpro.rewards.tasks.numbered_list import numbered_list
from alignpro.rewards.tasks.rules import TaskReward, by_rule

INSTRUCTIONS = {
    "one_sentence": "Answer in one short sentence.",
    "numbered": "Give your answer as a numbered list.",
    "depends": "If this is a question, answer in one short sentence. If I ask you to do something, answer with a numbered list.",
}

RULES: dict[str, TaskReward] = {"question": house_style, "request": numbered_list}
"""The reward of each kind of prompt."""

_QUESTION = re.compile(r"\A[^\n]*\?|\?[\s\"'”’)]*\Z")


def question_or_request(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Good is what `house_style` rewards if the prompt `is_question`, and what `numbered_list` rewards if not."""
    return by_rule(RULES, kind, prompts, responses)


def kind(text: str) -> str:
    """`question` if a prompt `is_question`, else `request`."""
    return "question" if is_question(text) else "request"


def is_question(text: str) -> bool:
    """Whether a prompt is a question: a question mark is in its first line, where what is asked mostly stands, or ends it."""
    return _QUESTION.search(text.strip()) is not None
