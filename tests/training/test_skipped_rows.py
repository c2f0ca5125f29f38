"""A row that does not fit, or that a chat template refuses, is skipped and counted in every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny_models import tokenizer
from tiny_runs import Workshop

from alignpro.cli import main

REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
COMMANDS = {
    "train": ("policy", "qwen2"),
    "rlhf": ("policy", "llama"),
    "sft": ("policy", "qwen2"),
    "reward": ("model", "llama"),
    "eval": ("target", "llama"),
    "optimal": ("target", "llama"),
}


@pytest.fixture
def refusing(workshop: Workshop, tmp_path: Path):
    """Return overrides of a command: data with one row of a system turn, and a template that refuses it."""

    def overrides(command: str) -> list[str]:
        section, architecture = COMMANDS[command]
        template = tmp_path / "chat.jinja"
        template.write_text(REFUSES + tokenizer(architecture).get_chat_template())
        files = {"sft": "rewrites", "reward": "pairs"}
        rows = [*(workshop.root / f"{files.get(command, 'prompts')}.jsonl").read_text().splitlines()[:8]]
        rows.insert(2, json.dumps(json.loads(rows[0]) | {"system": "be kind", "prompt": "reverse the word stone"}))
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(row + "\n" for row in rows))
        return [f"data.source={source}", "data.holdout=0", f"{section}.chat_template={template}"]

    return overrides


@pytest.mark.parametrize("command", ["train", "rlhf", "sft", "reward"])
def test_training_skips_it(
    command: str, workshop: Workshop, tmp_path: Path, refusing, caplog: pytest.LogCaptureFixture
) -> None:
    short = ["run.steps=1", "run.eval_every=0"]
    assert workshop.run(command, tmp_path / "run", *refusing(command), *short) == 0
    assert "1 of 9 prompts cannot be the" in caplog.text
    assert "rows.jsonl:3: " in caplog.text
    assert "System role not supported" in caplog.text


@pytest.mark.parametrize("command", ["eval", "optimal"])
def test_evaluation_skips_it(
    command: str, workshop: Workshop, tmp_path: Path, refusing, caplog: pytest.LogCaptureFixture
) -> None:
    training = yaml.safe_load((workshop.root / "train.yaml").read_text())
    config = {name: training[name] for name in ("data", "target", "reward")} | {"out": str(tmp_path / "out")}
    config |= {"respond": {"max_tokens": 4}}
    if command == "eval":
        config |= {"bootstrap": 100, "bound": False}
    if command == "optimal":
        config |= {"prompter": training["policy"], "rewrite": {"max_tokens": 4}, "candidates": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stopped:
        main([command, str(tmp_path / "config.yaml"), *refusing(command)])
    assert not stopped.value.code
    assert "1 of 9 prompts cannot be the target's" in caplog.text
    if command == "optimal":
        assert len((tmp_path / "out" / "rewrites.jsonl").read_text().splitlines()) == 8


def test_sft_skips_prompts_without_room_for_a_completion(
    workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*(workshop.root / "rewrites.jsonl").read_text().splitlines()[:6]]
    rows.append(json.dumps({"prompt": "word " * 100, "rewrite": "x"}))
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(row + "\n" for row in rows))
    given = [f"data.source={source}", "data.holdout=0", "run.steps=1", "run.eval_every=0"]
    assert workshop.run("sft", tmp_path / "run", *given) == 0
    assert "1 of 7 prompts do not fit in the 127 tokens of the model's input, beside a completion" in caplog.text


def test_a_column_that_the_reward_needs_is_missed_before_the_run(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("def score(completions, gold): return [0.0] * len(completions)\n")
    component = f"reward.components=[{{kind: function, function: '{tmp_path}/mine.py:score'}}]"
    assert workshop.run("rlhf", tmp_path / "run", component) == 1
    assert "its parameter 'gold' is neither in params nor a column of the data" in capsys.readouterr().err
