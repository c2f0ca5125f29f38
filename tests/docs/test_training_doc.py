"""docs/training.md is correct: its code runs, its tables list all settings and metrics, and everything it names exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from document import Document
from settings_table import settings
from tiny_runs import Workshop

from alignpro.config import EvalConfig, TrainConfig, validate_config
from alignpro.objectives import ADVANTAGES, Advantage, is_unbiased

DOCUMENT = Document("training.md")
ELSEWHERE = (
    *("run.out", "data", "target", "reward", "prompting", "deepspeed", "rollout.engine", "rollout.respond"),
    *("budget", "prices", "ledger"),
)
"""Keys that other documents explain, or that this one explains outside the table."""


def test_every_setting_is_in_the_table_with_its_default() -> None:
    told = {cells[0]: cells[1] for cells in DOCUMENT.rows("Settings")}
    of_responses = {f"rollout.rewrite.{name}" for name in ("top_k", "top_p", "min_p")}
    assert told == {key: default for key, default in settings(TrainConfig, ELSEWHERE) if key not in of_responses}


def test_python_blocks_run_and_every_metric_is_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    workshop = Workshop(tmp_path / "models")
    config = yaml.safe_load((workshop.root / "train.yaml").read_text())
    config["run"] |= {"out": "runs/mine"}
    config["reward"]["guards"] = [{"kind": "length_ratio"}]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    DOCUMENT.run()
    rows = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    told = {name for cells in DOCUMENT.rows("Metrics") for name in re.findall(r"[\w/]+", " ".join(cells))}
    found = {name for row in rows for name in row if not name.startswith(("engine/", "seconds/"))}
    assert (
        found - told - {"step", "reward/score", "reward/guard/length_ratio", "sample/logprob_difference_max"} == set()
    )


def test_the_table_of_advantages_says_what_the_classes_say() -> None:
    def words(advantage: Advantage) -> list[str]:
        unbiased = is_unbiased("exact", advantage) and is_unbiased("k1", advantage)
        return ["yes" if each else "no" for each in (advantage.needs_group, advantage.needs_critic, unbiased)]

    told = {name: [cell.partition(",")[0] for cell in cells] for name, *cells in DOCUMENT.rows("Algorithms")}
    assert told == {name: words(kind()) for name, kind in ADVANTAGES.items()}


def test_an_advantage_and_an_environment_of_the_users_own_train(workshop: Workshop, tmp_path: Path) -> None:
    for name in ("max_rl.py", "worst_case.py"):
        (code,) = [code for _, code in DOCUMENT.blocks("python") if code.startswith(f"# {name}\n")]
        (tmp_path / name).write_text(code)
    out = tmp_path / "run"
    settings = [
        f"objective.advantage={tmp_path / 'max_rl.py'}:MaxRL",
        f"environment={tmp_path / 'worst_case.py'}:WorstCase",
        "environment_params.quantile=0.25",
        "rollout.responses_per_rewrite=4",
    ]
    assert workshop.run("train", out, *settings) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(row["reward/gap"] > 0 for row in rows if "reward/mean" in row)
    assert workshop.run("train", tmp_path / "alone", settings[0], "rollout.rewrites_per_prompt=1") == 1


def test_the_examples_of_a_distillation_and_of_an_evaluation_are_valid_configurations() -> None:
    distillation, evaluation = (yaml.safe_load(block) for _, block in DOCUMENT.blocks("yaml"))
    validate_config(EvalConfig, evaluation)
    model, reward = {"path": "m"}, {"components": [{"kind": "function", "function": "rewards.py:reward"}]}
    run = distillation["run"] | {"out": "runs/distillation"}
    given = {"policy": model, "target": model, "data": {"source": "prompts.jsonl"}, "reward": reward, "run": run}
    settings = validate_config(TrainConfig, distillation | given)
    assert settings.objective.epochs * settings.objective.minibatches * settings.run.steps == 180
