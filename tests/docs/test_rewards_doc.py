"""docs/rewards.md is correct: its code runs, its defaults match the code, and its links exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import yaml
from document import Document
from settings_table import settings

from alignpro.config import (
    GuardConfig,
    HTTPRewardConfig,
    JudgeRewardConfig,
    ModelRewardConfig,
    RewardConfig,
    Section,
    validate_config,
)
from alignpro.data import Prompt
from alignpro.rewards import build_reward

DOCUMENT = Document("rewards.md")


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(DOCUMENT.blocks("python")[0][1])  # the function, in the file that the last block uses
    DOCUMENT.run()


def test_the_function_that_is_called_by_name_is_called_as_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(DOCUMENT.blocks("python")[0][1])
    defined = DOCUMENT.run()
    names = ("mentions_answer", "exact_match", "passes_tests")
    functions = [{"kind": "function", "function": defined[name]} for name in names]
    prompts = [
        Prompt.from_text("2 + 2", metadata={"answer": "4"}),
        Prompt.from_text("hello", metadata={"answer": None}),
    ]
    scored = build_reward(RewardConfig(components=functions))(prompts, ["It is 4.", "hi"], None)
    assert scored.components == {"mentions_answer": [1.0, None], "exact_match": [0.0, 0.0], "passes_tests": [0.0, 0.0]}
    assert scored.values == [1.0, 0.0]


def test_the_examples_are_valid_configurations() -> None:
    examples = [yaml.safe_load(block) for _, block in DOCUMENT.blocks("yaml")]
    rewards = [example["reward"] for example in examples if "reward" in example]
    assert len(rewards) == 3
    for reward in rewards:
        validate_config(RewardConfig, reward)


@pytest.mark.parametrize(("heading", "kind"), [("A judge", JudgeRewardConfig), ("A JSON server", HTTPRewardConfig)])
def test_the_keys_of_a_component_are_in_its_table(heading: str, kind: type[Section]) -> None:
    described = {}
    for keys, defaults, _ in DOCUMENT.rows(heading):
        names = keys.replace("`", "").split(", ")
        described |= dict(zip(names, defaults.split(", ") if len(names) > 1 else [defaults], strict=True))
    expected = dict(settings(kind, ["kind", "endpoint"]))
    if "endpoint" in kind.model_fields:
        expected["endpoint"] = ""
    assert {name: default.strip(" ,") for name, default in described.items()} == expected


def test_defaults_and_guards_match_the_code() -> None:
    fields = ModelRewardConfig.model_fields
    for keys, defaults, _ in DOCUMENT.rows("A reward model"):
        for key, default in zip(keys.replace("`", "").split(", "), defaults.split(", "), strict=True):
            assert fields[key].default == json.loads(default), key
    guards = get_args(GuardConfig.model_fields["kind"].annotation)
    assert [cells[0] for cells in DOCUMENT.rows("Drift guards")] == list(guards)
