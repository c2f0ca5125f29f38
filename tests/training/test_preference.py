"""What a reward model's evaluation on held-out pairs reports."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_runs import Workshop

from alignpro.config import ModelRewardConfig, RewardModelConfig, Section, load_config
from alignpro.errors import ModelError
from alignpro.training.input_files import check_input_files
from alignpro.training.preference import RewardTrainer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> RewardTrainer:
    workshop = Workshop(tmp_path_factory.mktemp("workshop"))
    settings = ["run.eval_prompts=64", "data.holdout=0.6"]
    return RewardTrainer(load_config(RewardModelConfig, workshop.arguments("reward", Path("out"), *settings)[1:]))


def test_accuracy_has_an_interval_beside_calibration_and_length(trainer: RewardTrainer) -> None:
    metrics = trainer.evaluate(0).metrics
    assert metrics["eval/accuracy_low"] < metrics["eval/accuracy"] < metrics["eval/accuracy_high"]
    for name in ("ties", "overconfidence", "calibration_error", "length_correlation", "longer_chosen"):
        assert math.isfinite(metrics[f"eval/{name}"]), name
    lengths = [(len(pair.chosen), len(pair.rejected)) for pair in trainer.heldout]
    longer = sum((a > b) + 0.5 * (a == b) for a, b in lengths) / len(lengths)
    assert metrics["eval/longer_chosen"] == pytest.approx(longer)


def test_a_model_that_cannot_tell_is_right_half_of_the_time(trainer: RewardTrainer) -> None:
    with torch.no_grad():
        trainer.model.classifier.score.weight.zero_()
    metrics = trainer.evaluate(0).metrics
    assert metrics["eval/ties"] == 1.0
    assert metrics["eval/accuracy"] == metrics["eval/longer_preferred"] == 0.5
    assert "eval/accuracy_low" not in metrics, "not estimable"


class Scorer(Section):
    """A configuration that uses a reward model."""

    reward: ModelRewardConfig


def test_a_reward_model_that_may_follow_length_can_be_refused(trainer: RewardTrainer, tmp_path: Path) -> None:
    trainer.export(tmp_path)
    record = tmp_path / "held_out_pairs.json"
    kept = json.loads(record.read_text())
    assert kept["pairs"] == len(trainer.heldout)
    assert kept["accuracy"] == pytest.approx(trainer.evaluate(0).metrics["eval/accuracy"])
    model = {"kind": "model", "model": {"path": str(tmp_path)}}
    uses, insists = (Scorer(reward=ModelRewardConfig(**model, must_beat_length=must)) for must in (False, True))
    check_input_files(uses)
    for above in (-0.01, 0.0, None):
        record.write_text(json.dumps({**kept, "above_length_low": above, "above_length_high": 0.2}))
        with pytest.raises(ModelError, match=r"above that of the responses' lengths alone.*must_beat_length: false"):
            check_input_files(insists)
    record.write_text(json.dumps({**kept, "above_length_low": 0.01}))
    check_input_files(insists)
    record.unlink()
    with pytest.raises(ModelError, match=r"needs the file held_out_pairs\.json"):
        check_input_files(insists)
