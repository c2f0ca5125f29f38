"""Fitting form: a list where a prompt asks for several things or for steps, a short complete answer anywhere else.

No fixed instruction has both, so a prompter gains most if what it writes depends on the prompt.
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
    "depends": "If I ask for several things or for steps, answer as a numbered list. Otherwise answer in one short sentence.",
}

RULES: dict[str, TaskReward] = {"several": numbered_list, "other": house_style}
"""The reward of each kind of prompt."""

_SEVERAL = re.compile(
    r"\b(lists?|steps|ways|tips|ideas|reasons|strategies|ingredients|recipe|brainstorm|itinerary|checklist"
    r"|pros and cons|advantages|differences|things to"
    r"|(what|which) are (?!you\b)|what \w+ are (?!you\b)|how to|how (do|can|could|should|would) (i|you|we|one|someone)\b"
    r"|(name|give|suggest|write|generate|provide)( me)?( a few| some| several| two| three| four| five| ten| \d+)( \w+)? \w+s)\b",
    re.IGNORECASE,
)


def fitting_form(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Good is what `numbered_list` rewards if the prompt `asks_for_several`, and what `house_style` rewards if not."""
    return by_rule(RULES, kind, prompts, responses)


def kind(text: str) -> str:
    """`several` if a prompt `asks_for_several`, else `other`."""
    return "several" if asks_for_several(text) else "other"


def asks_for_several(text: str) -> bool:
    """Whether a prompt asks for several things or for steps, by the words it uses: a list, ways, tips, how to …"""
    return _SEVERAL.search(text) is not None
