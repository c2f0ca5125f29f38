"""The rewards of the built-in tasks: what is good scores high, and what only looks like it does not."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

from alignpro.config import FunctionRewardConfig
from alignpro.data import Prompt
from alignpro.prompting.rewrite_template import RewriteTemplate
from alignpro.rewards import tasks
from alignpro.rewards.function import FunctionReward
from alignpro.rewards.tasks.fitting_form import asks_for_several
from alignpro.rewards.tasks.question_or_request import is_question
from alignpro.rewards.tasks.style_guide import RULES, kind
from alignpro.rewards.tasks.words import on_topic, sentences

NAMES = sorted(each.name for each in pkgutil.iter_modules(tasks.__path__) if each.name not in ("words", "rules"))

PROMPT = "Why do leaves change colour in autumn?"


def reward(name: str) -> FunctionReward:
    """The reward as a configuration names it."""
    return FunctionReward(FunctionRewardConfig(kind="function", function=f"alignpro.rewards.tasks.{name}:{name}"))


def score(name: str, response: str, prompt: str = PROMPT) -> float:
    (value,) = reward(name)([Prompt.from_text(prompt)], [response]).values
    assert value is not None
    assert 0 <= value <= 1
    return value


GOOD = {
    "fitting_form": "Leaves change colour in autumn because the green pigment fades and others show.",
    "house_style": "Leaves change colour in autumn because the green pigment fades and others show.",
    "greeting": "Hello! Leaves change colour in autumn as the green fades.",
    "numbered_list": "1. Days get short in autumn.\n2. Leaves lose their green.\n3. The other colour shows.",
    "plain_words": "Leaves are green. In autumn the green goes away. Then you see a new colour.",
    "question_or_request": "Leaves change colour in autumn because the green pigment fades and others show.",
    "style_guide": "Leaves change colour in autumn because the green pigment fades and others show.",
    "worked_example": "The green fades. For example, maple leaves change from green to a red colour in autumn.",
}


@pytest.mark.parametrize("name", NAMES)
def test_an_endless_number_is_no_number_of_an_item(name: str) -> None:
    """Python refuses to read more than 4,300 digits."""
    assert (
        score(name, "1" * 5000 + ". leaves change colour in autumn", "List three reasons why leaves change colour.") < 1
    )


def test_there_are_at_least_four_tasks_each_with_instructions_to_try() -> None:
    assert set(NAMES) == set(GOOD)
    for name in NAMES:
        instructions = importlib.import_module(f"alignpro.rewards.tasks.{name}").INSTRUCTIONS
        assert len(instructions) >= 2
        for text in instructions.values():
            assert PROMPT in RewriteTemplate(text, name)(PROMPT)


@pytest.mark.parametrize("name", NAMES)
def test_a_good_answer_scores_one_and_an_empty_or_unrelated_one_nothing(name: str) -> None:
    assert score(name, GOOD[name]) > 0.9
    assert score(name, "") == 0
    assert score(name, GOOD[name], "Translate the word cat to French") == 0


@pytest.mark.parametrize(
    ("name", "response", "value"),
    [
        ("house_style", GOOD["house_style"].rstrip("."), 0),  # cut off
        ("house_style", "Leaves change colour in autumn.", 0),  # too short
        ("house_style", "Leaves change colour in autumn " * 10 + ".", 0),  # too long
        ("house_style", "The leaves do so when the days get short and cold.", 1 / 3),  # one of three content words
        ("greeting", "Leaves change colour in autumn. Hello!", 0),
        ("greeting", "Hello! How can I help you today?", 0),
        ("greeting", "Hidden pigments change leaves in autumn", 0),  # "Hi" is not a word of it
        ("numbered_list", "1. Leaves change colour.\n3. Autumn is late.", 1 / 3),
        ("numbered_list", "Leaves change colour in autumn 1. 2. 3.", 0),
        ("numbered_list", "**1.** Leaves\n**2.** change\n**3.** in autumn\n**4.** colour", 1),
        ("plain_words", "leaves leaves change colour in autumn and are red", 0),
        ("worked_example", "Leaves change colour in autumn, for example.", 0),
    ],
)
def test_what_only_looks_good_scores_less(name: str, response: str, value: float) -> None:
    assert score(name, response) == pytest.approx(value)


@pytest.mark.parametrize(
    ("prompt", "several"),
    [
        ("Give me a list of ways to use paper", True),
        ("What are some good books on cooking?", True),
        ("how to center a div", True),
        ("How can I sit best?", True),
        ("Name three oceans.", True),
        ("Suggest a recipe for a vegan dessert.", True),
        ("Why do leaves change colour?", False),
        ("Hi, what are you?", False),
        ("How can leaves be red?", False),
        ("Name an ocean.", False),
        ("Is the glass listed?", False),
    ],
)
def test_a_list_fits_what_asks_for_several_things(prompt: str, several: bool) -> None:
    assert asks_for_several(prompt) is several
    content = prompt.rstrip("?.")
    as_list = f"1. {content}\n2. First\n3. Second"
    as_sentence = f"The one short answer to this is simply: {content}."
    assert score("fitting_form", as_list, prompt) == several
    assert score("fitting_form", as_sentence, prompt) == (not several)


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("Why do leaves change colour?", True),
        ("Is the glass full?\nThe glass holds water.", True),
        ("Answer this.\n\nWhy do leaves fall?", True),
        ('Who said "leaves change colour?"  ', True),
        ("Write a poem about leaves.", False),
        ("Correct the text.\nWhy do leaves fall? Nobody can tell.", False),
        ("list red leaves", False),
    ],
)
def test_a_sentence_fits_a_question_and_a_list_a_request(prompt: str, question: bool) -> None:
    assert is_question(prompt) is question
    content = prompt.strip().replace("\n", " ").replace("?", "").rstrip(".")
    as_list = f"1. {content}\n2. First\n3. Second"
    as_sentence = f"The one short answer to this is simply: {content}."
    assert score("question_or_request", as_list, prompt) == (not question)
    assert score("question_or_request", as_sentence, prompt) == question


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Name three red leaves?", "several"),
        ("Why do leaves fall?", "question"),
        ("Write about red leaves.", "request"),
    ],
)
def test_a_style_guide_has_a_rule_for_each_kind_of_prompt(prompt: str, expected: str) -> None:
    assert kind(prompt) == expected
    content = prompt.rstrip("?.")
    answers = {
        "several": f"1. {content}\n2. First\n3. Second",
        "question": f"The one short answer to this is simply: {content}.",
        "request": f"Hello! {content}, with pleasure",
    }
    assert {each: score("style_guide", answer, prompt) for each, answer in answers.items()} == {
        each: each == expected for each in RULES
    }


def test_plain_words_prefer_short_words_and_sentences() -> None:
    plain = score("plain_words", GOOD["plain_words"])
    learned = "Autumnal discolouration, leaves change colour, characterises deciduous organisms undergoing senescence."
    assert plain > score("plain_words", GOOD["plain_words"].replace(". ", " and ")) > score("plain_words", learned)


def test_words_and_sentences_of_any_text() -> None:
    assert on_topic("???", "anything") == 1
    assert on_topic("Who was Ada Lovelace?", "ada lovelace") == 1
    assert sentences("One.  Two!\n\n- \nThree 3.5 is not two") == ["One", "Two", "Three 3.5 is not two"]
