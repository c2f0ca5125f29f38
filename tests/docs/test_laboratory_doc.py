"""docs/laboratory.md is correct: it has every method and analysis, and its configurations are some."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import yaml
from document import Document
from settings_table import settings

from alignpro.config import ExperimentConfig, Method, validate_config
from alignpro.config.rival import SearchSection
from alignpro.experiments.cells import cells

DOCUMENT = Document("laboratory.md")
BESIDE = Document("experiments.md")


def test_its_links_resolve() -> None:
    DOCUMENT.check_links()


def test_every_kind_of_method_is_in_the_table() -> None:
    (union, _) = get_args(Method)
    kinds = {kind for each in get_args(union) for kind in get_args(each.model_fields["kind"].annotation)}
    table = DOCUMENT.text.partition("## Adapters")[0]
    told = {
        kind
        for row in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", table, re.MULTILINE)
        for kind in re.findall(r"\w+", row)
    }
    assert told - {"kind"} == kinds


def test_the_settings_of_a_search_are_those_of_its_configuration() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w*) \| ", DOCUMENT.text, re.MULTILINE))
    told = {key: value for key, value in rows.items() if key in SearchSection.model_fields}
    assert told | {"propose": ""} == {
        key: value for key, value in settings(SearchSection, ["propose."]) if "." not in key
    } | {"propose": ""}


def experiment(number: int) -> ExperimentConfig:
    """The experiment of docs/experiments.md with one of this document's additions."""
    given: dict[str, Any] = yaml.safe_load(BESIDE.blocks("yaml")[0][1])
    added = yaml.safe_load(DOCUMENT.blocks("yaml")[number][1])
    given["methods"] |= added.pop("methods", {})
    if "targets" in added:
        given["targets"] = {"a": {"path": "models/a"}, "b": {"path": "models/b"}} | added.pop("targets")
    return validate_config(ExperimentConfig, given | added)


def test_its_policies_are_trained_on_what_it_says() -> None:
    plan = {cell.method: cell for cell in cells(experiment(0)) if cell.seed == 0}
    commands = {name: plan[name].jobs[0].command for name in ("own_adapter", "soft_prompter", "soft_target")}
    assert commands == {"own_adapter": "train", "soft_prompter": "train", "soft_target": "rlhf"}
    assert plan["own_adapter"].prompter is None and plan["soft_prompter"].prompter == "small"


def test_its_rivals_have_the_calls_of_the_training() -> None:
    plan = cells(experiment(1))
    rivals = [cell for cell in plan if cell.jobs[0].command == "rival" and cell.seed == 0]
    assert [cell.method for cell in rivals] == ["gepa", "gepa_helped", "miprov2"]
    assert {cell.jobs[0].config.target_calls for cell in rivals} == {40 * 8 * 8}  # type: ignore[attr-defined]


def test_its_transfer_has_a_cell_for_each_other_target() -> None:
    config = experiment(2)
    moved = {(cell.trained_on, cell.target) for cell in cells(config) if cell.trained_on}
    assert moved == {("a", "b"), ("b", "a"), ("both", "a"), ("both", "b")}
    assert Path("cells/house_style/b/align_pro/small/from_a/seed_0") in {
        cell.directory.relative_to(config.out) for cell in cells(config)
    }
