"""docs/tasks.md is correct: its configurations are valid, its table lists the tasks, and the real preset is as it says."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import pytest
import yaml
from document import ROOT, Document

from alignpro.config import EvalConfig, HeadroomConfig, RLHFConfig, SFTConfig, TrainConfig, load_config, validate_config
from alignpro.config.section import Section
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
    names = {each.name for each in pkgutil.iter_modules(tasks.__path__)} - {"words"}
    assert told == {f"{name}:{name}" for name in names}


def test_the_preset_is_valid_for_every_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DATA", "OUT", "MODEL"):
        monkeypatch.setenv(name, str(tmp_path))
    prompts = str(PRESET / "prompts.yaml")
    assert load_config(SFTConfig, [prompts, str(PRESET / "sft.yaml")]).data.moves == "default"
    measured = load_config(HeadroomConfig, [prompts, str(PRESET / "headroom.yaml")])
    files = {path.stem: path for path in (PRESET / "tasks").glob("*.yaml")}
    assert files.keys() == measured.tasks.keys()
    for name, path in files.items():
        monkeypatch.setenv("TASK", name)
        train = load_config(TrainConfig, [prompts, str(PRESET / "train.yaml"), str(path)])
        assert train.reward == measured.tasks[name].reward
        assert build_reward(train.reward)
        for file, kind in (("rlhf.yaml", RLHFConfig), ("eval.yaml", EvalConfig)):
            given = load_config(kind, [prompts, str(PRESET / file), str(path)])
            assert given.data == train.data
