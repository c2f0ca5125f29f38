"""Style guide: of three rules one applies to each prompt: lists for lists, a sentence for a question, a greeting before work.

Each fixed instruction follows one rule and breaks the others, so a prompter has to tell three kinds of prompts apart.
"""

from __future__ import annotations

from collections.abc import Sequence

from alignpro.data import Prompt
from alignpro.rewards.tasks.fitting_form import asks_for_several
from alignpro.rewards.tasks.greeting import greeting
from alignpro.rewards.tasks.house_style import house_style
from alignpro.rewards.tasks.numbered_list import numbered_list
from alignpro.rewards.tasks.question_or_request import is_question
from alignpro.rewards.tasks.rules import TaskReward, by_rule

INSTRUCTIONS = {
    "one_sentence": "Answer in one short sentence.",
    "numbered": "Give your answer as a numbered list.",
    "hello": 'Begin your answer with "Hello!" and be friendly.',
    "depends": (
        "If I ask for several things or for steps, answer as a numbered list. If I ask another question, answer in one short "
        'sentence. Otherwise begin your answer with "Hello!" and be friendly.'
    ),
}

RULES: dict[str, TaskReward] = {"several": numbered_list, "question": house_style, "request": greeting}
"""The reward of each kind of prompt."""


def style_guide(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Good is what the rule for the prompt's `kind` rewards."""
    return by_rule(RULES, kind, prompts, responses)


def kind(text: str) -> str:
    """`several` if a prompt asks for several things or for steps, else `question` if it is one, else `request`."""
    return "several" if asks_for_several(text) else "question" if is_question(text) else "request"
