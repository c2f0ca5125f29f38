"""docs/self_reward.md is correct: its settings and metrics exist, and its method is one of an experiment."""

from __future__ import annotations

import re
from typing import Any

import yaml
from document import Document
from settings_table import settings

from alignpro.config import ExperimentConfig, SelfRewardConfig, validate_config
from alignpro.experiments.cells import cells

DOCUMENT = Document("self_reward.md")
BESIDE = Document("experiments.md")


def test_its_links_resolve() -> None:
    DOCUMENT.check_links()


def test_its_settings_are_those_of_the_configuration() -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| ([\w.]+) \| ", DOCUMENT.text, re.MULTILINE))
    assert told == dict(settings(SelfRewardConfig, ()))


def test_its_method_has_a_cell_for_each_alpha_and_iteration() -> None:
    given: dict[str, Any] = yaml.safe_load(BESIDE.blocks("yaml")[0][1])
    given["methods"] |= yaml.safe_load(DOCUMENT.blocks("yaml")[0][1])["methods"]
    plan = [cell for cell in cells(validate_config(ExperimentConfig, given)) if cell.method == "self_reward"]
    assert {(cell.alpha, cell.iteration) for cell in plan} == {(a, i) for a in (0.0, 0.5, 0.9, 1.0) for i in (1, 2, 3)}
    first = plan[0].jobs[0].config
    most = first.self_reward.branches * (1 + (first.self_reward.sentences - 1) * first.self_reward.beams)  # type: ignore[attr-defined]
    assert most == 4 + 3 * 4 * 4 and first.objective.loss == "gibbs"  # type: ignore[attr-defined]
