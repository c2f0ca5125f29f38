"""docs/laboratory.md is correct: it has every method and analysis, and its configurations are some."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from document import ROOT, Document
from settings_table import settings

from alignpro.config import ExperimentConfig, Method, RivalConfig, load_config, validate_config
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


def test_its_rival_alone_can_be_configured_as_it_says() -> None:
    config = validate_config(RivalConfig, yaml.safe_load(DOCUMENT.blocks("yaml")[2][1]))
    assert (config.kind, config.target_calls) == ("gepa", 2000)


def test_its_transfer_has_a_cell_for_each_other_target() -> None:
    config = experiment(3)
    moved = {(cell.trained_on, cell.target) for cell in cells(config) if cell.trained_on}
    assert moved == {("a", "b"), ("b", "a"), ("both", "a"), ("both", "b")}
    assert Path("cells/house_style/b/align_pro/small/from_a/seed_0") in {
        cell.directory.relative_to(config.out) for cell in cells(config)
    }


PRESET = ROOT / "launch/presets/laboratory"
KEPT = ROOT / "docs/laboratory"


def test_the_preset_has_a_cell_of_each_method_of_the_laboratory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", "runs/laboratory")
    config = load_config(ExperimentConfig, [str(PRESET / "experiment.yaml")])
    plan = [cell for cell in cells(config) if cell.seed == 0]
    assert len(plan) == 39
    names = {cell.name for cell in plan}
    for line in re.findall(r"\$\(run (\w+) (\w+) ", (PRESET / "run.sh").read_text(encoding="utf-8")):
        assert "cells/{}/first/{}/small/seed_0".format(*line) in names
    strengths = [cell.name.split("/")[-2] for cell in plan if cell.method == "dial"]
    assert strengths == ["s_0.25", "s_0.5", "s_0.75", "s_1.25", "s_1.5"]
    trained = [cell.jobs[0].config for cell in plan if cell.method.startswith("lambda_")]
    coefs = [each.objective.kl.coef for each in trained]  # type: ignore[attr-defined]
    assert coefs == pytest.approx([config.kl_coef / float(each.removeprefix("s_")) for each in strengths])
    memory = next(cell for cell in plan if cell.method == "memory").jobs[0].config
    assert Path(memory.memory.template).is_file()  # type: ignore[attr-defined]


def test_its_tables_are_those_of_the_cells_that_are_kept() -> None:
    tables = runpy.run_path(str(PRESET / "collect.py"))["tables"](KEPT)
    told = DOCUMENT.text.partition("## On the embedded world")[2]
    assert [line for table in tables.values() for line in table if line not in told.splitlines()] == []
    rows = sum(len(table) for table in tables.values())
    assert len([line for line in told.splitlines() if line.startswith("|")]) == rows


def test_the_summary_that_is_kept_is_of_the_cells_beside_it() -> None:
    summary = json.loads((KEPT / "summary.json").read_text(encoding="utf-8"))
    kept = list(KEPT.glob("cells/**/cell.json"))
    assert len(kept) == summary["cells_done"]
    assert all(json.loads(path.read_text())["state"] == "done" for path in kept)
    assert f"{summary['cells_done']} of {summary['cells_done'] + len(summary['cells_left'])} cells" in DOCUMENT.text
