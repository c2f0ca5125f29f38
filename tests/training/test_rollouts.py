"""Samples that are drawn a step ahead: when, by which policy, and what a checkpoint keeps of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_runs import Workshop, read_metrics
from tiny_world import World

from alignpro.engine import Chain, Completion, Engine, SamplingParams
from alignpro.targets.base import BegunRollout
from alignpro.training.reinforcement import RLTrainer
from alignpro.training.rollouts import FILE_NAME, SamplingAhead

AHEAD = "rollout.ahead=1"


class Diary(World):
    """A world that notes when samples are drawn, after how many updates, and when their responses are awaited."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[str] = []
        self.trainer: RLTrainer | None = None

    def begin_rollout(
        self,
        engine: Engine,
        prompts: Sequence,
        params: SamplingParams,
        seeds: Sequence[int],
        drawn: Sequence[Sequence[Completion]] | None = None,
    ) -> BegunRollout:
        assert self.trainer is not None
        number = sum(entry.startswith("draw") for entry in self.entries)
        self.entries.append(f"draw {number} from policy {self.trainer.updates}")
        begun = super().begin_rollout(engine, prompts, params, seeds, drawn)

        def finish() -> list[list[Chain]]:
            self.entries.append(f"await {number}")
            return begun()

        return BegunRollout(begun.samples, finish)


def ahead_training(world: World, out: Path, steps: int = 3) -> RLTrainer:
    return world.training({}, 2, out, steps=steps, learning_rate=0.05, ahead=SamplingAhead(world.begin_rollout))


def test_samples_are_drawn_before_the_answers_to_the_step_before_are_awaited(tmp_path: Path) -> None:
    world = Diary()
    world.trainer = ahead_training(world, tmp_path)
    rows = [world.trainer.step(step) for step in range(3)]
    assert world.entries == [
        "draw 0 from policy 0",
        "draw 1 from policy 0",
        "await 0",
        "draw 2 from policy 1",
        "await 1",
        "await 2",
    ]
    for name in ("importance/mean", "importance/max", "importance/effective"):
        assert rows[0][name] == pytest.approx(1, abs=1e-5)  # drawn by the current policy
        assert abs(rows[1][name] - 1) > 1e-4
    assert rows[1]["importance/truncated"] == 0


def test_a_checkpoint_keeps_the_samples_of_steps_that_have_not_been_made(tmp_path: Path) -> None:
    first, second = World(), World()
    trainer = ahead_training(first, tmp_path)
    trainer.step(0)
    trainer.rollouts.save(tmp_path)
    (row,) = json.loads((tmp_path / FILE_NAME).read_text())
    assert (row["step"], len(row["samples"])) == (1, 2)
    resumed = ahead_training(second, tmp_path)  # of the policy before the first update, which must not draw anew
    resumed.rollouts.load(tmp_path)
    assert resumed.rollouts(1).chains == trainer.rollouts(1).chains


def test_a_failed_sample_is_drawn_anew_by_a_resumed_run(tmp_path: Path) -> None:
    trainer = ahead_training(World(), tmp_path)
    trainer.step(0)
    begun = trainer.rollouts._begun[1].rollout
    begun.samples[0][1].error = "out of pages"
    trainer.rollouts.save(tmp_path)
    assert json.loads((tmp_path / FILE_NAME).read_text()) == []


def test_a_target_in_this_process_gains_nothing_and_is_told_so(
    workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert workshop.run("train", tmp_path / "run", AHEAD, "run.steps=1", "run.eval_every=0") == 0
    assert caplog.text.count("rollout.ahead=1 with a target in this process") == 1
    assert "importance/mean" in read_metrics(tmp_path / "run")[0]


OWN_ROLLOUT = """
from alignpro.environments.prompt import PromptEnvironment

class Own(PromptEnvironment):
    def rollout(self, engine, prompts, params, seeds):
        return super().rollout(engine, prompts, params, seeds)
"""


def test_an_environment_with_a_rollout_of_its_own_is_refused(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(OWN_ROLLOUT)
    assert workshop.run("train", tmp_path / "run", AHEAD, f"environment={tmp_path / 'own.py'}:Own") == 1
    assert "it has a rollout of its own, which cannot be begun ahead" in " ".join(capsys.readouterr().err.split())
