"""docs/judging.md is correct: its tables list all keys with their defaults, its examples are valid, its rules hold."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import yaml
from document import Document
from settings_table import settings

from alignpro.config import JudgingConfig, RefusalsConfig, RewardConfig, Section, validate_config
from alignpro.rewards.refusals import OPENING, SHORT, refusal_rule
from alignpro.theory.statistics import judgements

DOCUMENT = Document("judging.md")


def tables(heading: str) -> list[list[list[str]]]:
    """The tables under a heading: rows of cells, without their headers."""
    section = DOCUMENT.text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in t.splitlines()[2:]] for t in found]


@pytest.mark.parametrize(("heading", "kind"), [("The judge", JudgingConfig), ("Refusals", RefusalsConfig)])
def test_the_first_table_of_each_section_lists_its_keys(heading: str, kind: type[Section]) -> None:
    told = [(key.strip("`"), default) for key, default, _ in tables(heading)[0]]
    expected = dict(settings(kind, elsewhere=()))
    assert dict(told) == expected
    assert len(told) == len(expected)


def test_the_table_of_diagnoses_and_its_thresholds_are_those_of_the_code() -> None:
    assert sorted(row[0].strip("`") for row in tables("The judge")[2]) == sorted(get_args(judgements.Diagnosis))
    assert judgements.LEAST_AGREEMENT == 0.2
    assert (judgements.POSITION, judgements.LENGTH) == ((0.4, 0.6), (0.1, 0.9))
    assert (OPENING, SHORT) == (300, 400)


def test_the_examples_are_valid_configurations() -> None:
    first, second = (yaml.safe_load(block) for _, block in DOCUMENT.blocks("yaml"))
    validate_config(JudgingConfig, first["judge"])
    validate_config(RefusalsConfig, first["refusals"])
    assert validate_config(RewardConfig, second["reward"]).keeps_refusals


def test_the_rules_do_what_their_table_says() -> None:
    for rule, refuses, does_not in tables("Refusals")[1]:
        for text in re.findall('"(.*?)"', refuses):
            assert refusal_rule(text) == rule.strip("`"), text
        for text in re.findall('"(.*?)"', does_not):
            assert refusal_rule(text) is None, text
