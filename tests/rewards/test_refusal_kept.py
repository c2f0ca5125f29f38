"""The guard that keeps refusals: what it measures, what it takes off, and what it must be told."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import Workshop, assert_same, read_metrics

from alignpro.config import GuardConfig, HeadroomConfig, RewardConfig, TrainConfig, validate_config
from alignpro.data import Prompt
from alignpro.errors import ConfigError, RewardError
from alignpro.rewards import RewardStack, build_reward

HARMFUL, HARMLESS = Prompt.from_text("how do I steal a car"), Prompt.from_text("how do I bake bread")
REFUSES, ANSWERS = "I'm sorry, but I can't help with that.", "Take the key and open the door."


def half(prompts, responses):
    return [0.5] * len(responses)


def stack(penalty: float = 2.0) -> RewardStack:
    guards = [{"kind": "refusal_kept", "penalty": penalty}]
    reward = build_reward(RewardConfig(components=[{"kind": "function", "function": half}], guards=guards))
    assert reward.refusal_kept is not None
    reward.refusal_kept.learn([HARMFUL, HARMLESS], [True, False])
    return reward


def test_only_a_lost_refusal_is_penalised():
    prompts = [HARMFUL, HARMFUL, HARMLESS, HARMLESS]
    scored = stack()(prompts, [REFUSES, ANSWERS, REFUSES, ANSWERS], ["x"] * 4)
    assert scored.components["guard/refusal_kept"] == [1.0, 0.0, 1.0, 1.0]
    assert scored.components["guard/refusal_kept/penalty"] == [0.0, 2.0, 0.0, 0.0]
    assert scored.values == [0.5, -1.5, 0.5, 0.5]
    assert scored.raw == [0.5] * 4


def test_without_a_penalty_it_is_measured_only():
    scored = stack(penalty=0.0)([HARMFUL], [ANSWERS], ["x"])
    assert scored.values == [0.5]
    assert scored.components["guard/refusal_kept"] == [0.0]


def test_without_rewrites_it_is_skipped():
    assert "guard/refusal_kept" not in stack()([HARMFUL], [ANSWERS], None).components


def test_each_unknown_prompt_is_asked_for_once():
    guard = stack().refusal_kept
    other = Prompt.from_text("another")
    assert guard is not None
    assert guard.unknown([other, HARMFUL, other]) == [other]
    with pytest.raises(RewardError, match=r"unchanged prompt is not known.*\n.*another"):
        guard([other], [ANSWERS])


def test_what_it_cannot_be_used_with_is_refused():
    with pytest.raises(ConfigError, match="takes no `low` and `high`"):
        validate_config(GuardConfig, {"kind": "refusal_kept", "low": 1.0})
    reward = {"components": [{"kind": "function", "function": half}], "guards": [{"kind": "refusal_kept"}]}
    common = {"data": {"source": "x.jsonl"}, "reward": reward}
    mixture = {"mixture": [{"path": "a"}, {"path": "b"}]}
    with pytest.raises(ConfigError, match="the refusals of one target"):
        validate_config(TrainConfig, common | {"policy": {"path": "p"}, "target": mixture, "run": {"out": "o"}})
    headroom = {"out": "o", "data": common["data"], "prompter": {"path": "p"}, "target": {"path": "a"}}
    with pytest.raises(ConfigError, match="headroom is measured without this guard"):
        validate_config(HeadroomConfig, headroom | {"tasks": {"a": {"reward": reward}}})


def test_a_guarded_run_is_resumed_bit_for_bit(workshop: Workshop, finished: Callable[..., Path], tmp_path: Path):
    guarded = "reward.guards=[{kind: refusal_kept, penalty: 1}]"
    reference = finished("train", guarded)
    assert read_metrics(reference)[0]["reward/guard/refusal_kept"] == 1.0
    out = shutil.copytree(reference, tmp_path / "run")
    assert workshop.run("train", out, guarded, "--resume", "--at", "2") == 0
    assert_same(out, reference)
