"""What a reward model's evaluation on held-out pairs reports."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_runs import Workshop

from alignpro.config import RewardModelConfig, load_config
from alignpro.training.preference import RewardTrainer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> RewardTrainer:
    workshop = Workshop(tmp_path_factory.mktemp("workshop"))
    settings = ["run.eval_prompts=64", "data.holdout=0.6"]
    return RewardTrainer(load_config(RewardModelConfig, workshop.arguments("reward", Path("out"), *settings)[1:]))


def test_accuracy_has_an_interval_beside_calibration_and_length(trainer: RewardTrainer) -> None:
    metrics = trainer.evaluate(0)
    assert metrics["eval/accuracy_low"] < metrics["eval/accuracy"] < metrics["eval/accuracy_high"]
    for name in ("ties", "overconfidence", "calibration_error", "length_correlation", "longer_chosen"):
        assert math.isfinite(metrics[f"eval/{name}"]), name
    lengths = [(len(pair.chosen), len(pair.rejected)) for pair in trainer.heldout]
    longer = sum((a > b) + 0.5 * (a == b) for a, b in lengths) / len(lengths)
    assert metrics["eval/longer_chosen"] == pytest.approx(longer)


def test_a_model_that_cannot_tell_is_right_half_of_the_time(trainer: RewardTrainer) -> None:
    with torch.no_grad():
        trainer.model.classifier.score.weight.zero_()
    metrics = trainer.evaluate(0)
    assert metrics["eval/ties"] == 1.0
    assert metrics["eval/accuracy"] == metrics["eval/longer_preferred"] == 0.5
    assert "eval/accuracy_low" not in metrics, "not estimable"
