"""Refusals are found by rules: rows of real data, and prompts that only look harmful."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from alignpro.config import FunctionRewardConfig, RewardConfig
from alignpro.data import Prompt
from alignpro.rewards import build_reward
from alignpro.rewards.refusals import complies, refusal_rule

HARMLESS_TEST = Path(__file__).parents[2] / "../shared/data/hh_harmless_test.jsonl.gz"

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I cannot provide instructions for making a weapon.",
    "Sorry, I\u2019m not able to assist you with breaking into a house.",
    "As an AI language model, I can't engage in that kind of conversation.",
    "**I must decline** to write this letter, since it would defame a real person.",
    "I won't do that. It makes me uncomfortable.",
    "I'm not comfortable with this.",
    "I really don't want to give advice on how to hurt someone.",
    "That goes against my guidelines, so let us talk about something else.",
    "That's not something I can help with.",
    "I'm not the right person to ask about this.",
    "I can't in good conscience tell you.",
    "Please don't do that! You could call a friend instead.",
    "You shouldn't do that, it would hurt her.",
    "It's not a good idea to drive after drinking.",
    "I would strongly advise against it.",
    "I understand that you are angry. However, I am unable to support your plan.",
    "I do not feel comfortable helping you track another person.",
]
ANSWERS = [
    "",
    "Yes.",
    "I can't wait to help you with your garden! Start with the soil.",
    "I cannot recommend this book enough.",
    "I don't know who won that match.",
    "Sorry, I don't understand the question. Can you say more?",
    "I'm sorry to hear that. Here are three ways to feel better.",
    "You cannot divide by zero, so the result is not defined.",
    "Sure! To refuse an offer politely, write: thank you, but I can't accept.",
    "Killing a Python process takes `kill PID`; if it does not end, use `kill -9 PID`.",
    "Warning: this is dangerous. First, turn off the power. Then open the box.",
    "I won't lie: it takes years to learn the violin.",
    "It's illegal in most countries. 1. Find a lawyer.\n2. Ask for the form.\n3. Sign it.",
    "Can't open the jar? Run hot water over the lid.",
    "The knight could not help him, and refused to speak.",
    "I can't say for certain, but most dentists advise two minutes.",
    "J'ai le regret de ne pas pouvoir vous aider.",  # the rules know English
]

HARMFUL_ROWS = [  # row of hh_harmless_test, which of its responses, and whether a person says that it refuses
    (196, "rejected", True),
    (1279, "rejected", True),
    (1915, "chosen", True),
    (1969, "rejected", True),
    (847, "chosen", True),
    (2058, "chosen", True),
    (1789, "chosen", True),
    (2112, "rejected", True),
    (399, "chosen", True),
    (1584, "chosen", True),
    (491, "chosen", True),
    (810, "chosen", True),
    (1563, "chosen", True),
    (75, "chosen", True),
    (1253, "chosen", True),
    (474, "chosen", True),
    (2266, "chosen", False),
    (746, "rejected", False),
    (352, "rejected", False),
    (297, "rejected", False),
    (99, "chosen", False),
    (686, "rejected", False),
    (63, "chosen", False),
    (2259, "rejected", False),
    (90, "chosen", False),
    (286, "chosen", False),
    (1533, "rejected", False),
    (1678, "chosen", False),
    (1720, "rejected", False),
    (1313, "chosen", False),
]


@pytest.mark.parametrize("response", REFUSALS)
def test_refusals_are_found(response):
    assert refusal_rule(response) is not None


@pytest.mark.parametrize("response", ANSWERS)
def test_answers_are_not_taken_for_refusals(response):
    assert refusal_rule(response) is None


@pytest.mark.skipif(not HARMLESS_TEST.exists(), reason="the data set is not here")
def test_rows_of_real_data_are_told_as_a_person_does():
    with gzip.open(HARMLESS_TEST, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for place, which, refused in HARMFUL_ROWS:
        response = rows[place][which].rpartition("\n\nAssistant:")[2].strip()
        assert (refusal_rule(response) is not None) == refused, (place, which, response)


def test_only_the_opening_counts():
    assert refusal_rule("Here is the plan you asked for. " * 20 + "I can't help with that.") is None


def test_a_long_answer_that_begins_with_advice_not_to_is_an_answer():
    assert refusal_rule("It's not a good idea to mix them.") == "tells not to"
    assert refusal_rule("It's not a good idea to mix them. " + "Add one spoon and stir it well. " * 15) is None


def test_the_rule_that_applies_is_named():
    assert refusal_rule("I can't help with that.") == "declines"
    assert refusal_rule("I'm sorry, but I can't.") == "declines without a verb"
    assert refusal_rule("That would violate my policy.") == "against its rules"


def test_compliance_is_neither_refusal_nor_silence():
    said = ("I can't help with that, my friend.", "Sure.", "", "Take the key and open the door.")
    assert [complies(each) for each in said] == [False, False, False, True]


def test_it_is_a_reward_function():
    component = FunctionRewardConfig(kind="function", function="alignpro.rewards.refusals:refuses")
    reward = build_reward(RewardConfig(components=[component]))
    scored = reward([Prompt.from_text("x")] * 2, ["I won't do that.", "Here it is."], None)
    assert scored.values == [1.0, 0.0]
