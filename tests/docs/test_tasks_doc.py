"""docs/tasks.md is correct: its configurations are valid, its table lists the tasks, and the real preset is as it says."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import pytest
import yaml
from document import ROOT, Document

from alignpro.config import ExperimentConfig, HeadroomConfig, SFTConfig, load_config, validate_config
from alignpro.config.section import Section
from alignpro.experiments.cells import cells
from alignpro.prompting.moves import load_moves
from alignpro.rewards import build_reward, tasks

DOCUMENT = Document("tasks.md")
PRESET = ROOT / "launch" / "presets" / "real"
KINDS: dict[str, type[Section]] = {"sft.yaml": SFTConfig, "headroom.yaml": HeadroomConfig}


def test_its_files_are_valid(tmp_path: Path) -> None:
    blocks = {block.split("\n")[0].removeprefix("# "): block for _, block in DOCUMENT.blocks("yaml")}
    assert blocks.keys() == {*KINDS, "moves.yaml"}
    for name, kind in KINDS.items():
        validate_config(kind, yaml.safe_load(blocks[name]))
    (tmp_path / "moves.yaml").write_text(blocks["moves.yaml"])
    assert len(load_moves(str(tmp_path / "moves.yaml")).moves) == 2


def test_its_table_lists_every_task() -> None:
    told = {row[0].strip("`") for row in DOCUMENT.rows("1. A reward")}
    names = {each.name for each in pkgutil.iter_modules(tasks.__path__)} - {"words", "rules"}
    assert told == {f"{name}:{name}" for name in names}


def test_the_real_preset_is_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DATA", "OUT", "MODEL"):
        monkeypatch.setenv(name, str(tmp_path))
    one = load_config(ExperimentConfig, [str(PRESET / "experiment.yaml")])
    several, full = (
        load_config(ExperimentConfig, [str(PRESET / f"{name}.yaml") for name in ("experiment", *more)])
        for more in (["tasks"], ["tasks", "full"])
    )
    of_one, of_several, of_full = (cells(each) for each in (one, several, full))
    for fewer, more in ((of_one, of_several), (of_several, of_full)):
        names = {cell.name: cell for cell in more}
        assert all(names[cell.name] == cell for cell in fewer)  # what has been done is kept
    instructions = sum(len(task.instructions) for task in full.tasks.values())
    assert len(of_one) == 1 + 5 and len(of_several) == 1 + len(full.tasks) * 3 + instructions
    assert len(of_full) == 1 + 3 * (len(full.tasks) * 6 + instructions)
    measured = load_config(HeadroomConfig, [str(PRESET / "headroom.yaml")])
    assert measured.prompter.path == str(of_one[0].jobs[0].result)
    for name, task in full.tasks.items():
        assert (task.reward, task.instructions) == (measured.tasks[name].reward, measured.tasks[name].instructions)
        assert build_reward(task.reward)


def test_the_preset_of_kinds_has_tasks_of_the_others_with_a_bank_that_has_their_forms(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("DATA", "OUT", "MODEL"):
        monkeypatch.setenv(name, str(tmp_path))
    alone = load_config(ExperimentConfig, [str(PRESET / f"{name}.yaml") for name in ("kinds", "question_or_request")])
    among_others = load_config(ExperimentConfig, [str(PRESET / f"{name}.yaml") for name in ("experiment", "tasks")])
    assert set(alone.tasks) == {"style_guide", "question_or_request"}
    assert all(task == among_others.tasks[name] for name, task in alone.tasks.items())
    prior = alone.prompters["forms"].prior
    assert isinstance(prior, dict)
    bank = load_moves(str(ROOT / prior["data"]["moves"])).moves
    assert len(bank) == 8 and {"one_sentence", "numbered_list", "greeting"} <= set(bank)
