"""docs/walkthrough.md is correct: its files and commands run in order, and its table lists the keys of every command."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from document import Document
from settings_table import settings
from tiny_runs import Workshop
from typer.main import get_command

from alignpro.cli import app, main
from alignpro.config import (
    EvalConfig,
    HeadroomConfig,
    OptimalConfig,
    RewardModelConfig,
    RLHFConfig,
    Section,
    SFTConfig,
    TrainConfig,
)

DOCUMENT = Document("walkthrough.md")

SMALLER = {
    "sft.yaml": {"run": {"steps": 2}, "batch_size": 4},
    "train.yaml": {
        "run": {"steps": 2, "eval_every": 1, "eval_prompts": 2},
        "data": {"holdout": 0.3},
        "rollout": {"prompts_per_step": 2, "rewrites_per_prompt": 2},
    },
    "rlhf.yaml": {
        "run": {"steps": 1, "eval_every": 1, "eval_prompts": 2},
        "data": {"holdout": 0.3},
        "rollout": {"prompts_per_step": 2, "responses_per_prompt": 2},
    },
    "eval.yaml": {"data": {"holdout": 0.3}, "prompts": 4, "gibbs_candidates": 2},
}
"""Smaller values for some keys of the files; sequences have a few tokens."""


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_its_files_and_commands_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Workshop(tmp_path)
    monkeypatch.chdir(tmp_path)
    python = {block.split("\n")[0].removeprefix("# "): block for _, block in DOCUMENT.blocks("python")}
    assert python.keys() == {"reward.py"}
    Path("reward.py").write_text(python["reward.py"])
    for _, block in DOCUMENT.blocks("yaml"):
        name = block.split("\n")[0].removeprefix("# ")
        Path(name).write_text(yaml.safe_dump(smaller(yaml.safe_load(block), SMALLER[name])))
    for _, block in DOCUMENT.blocks("sh"):
        for line in block.splitlines():
            with pytest.raises(SystemExit) as stop:
                main(shlex.split(line, comments=True)[1:])
            assert not stop.value.code, (line, capsys.readouterr().err)
    assert Path("runs/eval/report.html").is_file()
    assert "oracle" in json.loads(Path("runs/eval_with_oracle/rewards.json").read_text())["arms"]
    assert len(Path("rewrites_of_mine.jsonl").read_text().splitlines()) == 24
    assert json.loads(Path("runs/train/model/adapter_config.json").read_text())["r"] == 16


def test_its_commands_for_model_files_exist_with_their_options() -> None:
    lines = [line for _, block in DOCUMENT.blocks("console") for line in block.splitlines() if "alignpro model" in line]
    assert len(lines) == 3
    commands = get_command(app).commands["model"].commands  # type: ignore[attr-defined]
    for line in lines:
        _, _, name, *arguments = shlex.split(line, comments=True)
        commands[name].make_context(name, list(arguments))


ELSEWHERE = ("data", "reward", "prompting", "deepspeed", "model", "prompter.", "rewrite.", "respond.", "engine.")
"""Sections that other tables explain."""


def smaller(config: dict, changes: dict) -> dict:
    """Return the configuration with some values replaced, and sequences of four tokens."""
    for key, value in changes.items():
        config[key] = smaller(config[key], value) if isinstance(value, dict) else value
    for key, value in config.items():
        if isinstance(value, dict):
            config[key] = smaller(value, {})
        elif key == "max_tokens":
            config[key] = 4
    return config


def test_the_table_lists_the_keys_that_only_other_commands_have() -> None:
    kinds: dict[str, type[Section]] = {
        "sft": SFTConfig,
        "reward": RewardModelConfig,
        "rlhf": RLHFConfig,
        "eval": EvalConfig,
        "headroom": HeadroomConfig,
        "optimal": OptimalConfig,
    }
    common = set(settings(TrainConfig, elsewhere=()))
    own: dict[tuple[str, str], set[str]] = {}
    for command, kind in kinds.items():
        for key, default in settings(kind, ELSEWHERE):
            if (key, default) not in common:
                own.setdefault((key, default), set()).add(command)
    told = {
        (key, default): set(re.findall(r"\w+", commands))
        for key, default, commands, _ in DOCUMENT.rows("Settings of the other commands")
    }
    assert told == own
