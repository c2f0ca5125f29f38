"""The exported model is the best by prompts that nothing else uses, or the last within noise; in interrupted runs too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Workshop, flip_bit, read_model, steps_of_checkpoints
from torch import nn

from alignpro.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig, validate_config
from alignpro.config.run import SelectingSection
from alignpro.data import Prompt, split, split_for_training
from alignpro.errors import CheckpointError, ConfigError, TrainingError
from alignpro.training.backend import TorchBackend
from alignpro.training.heldout_evaluation import OBJECTIVE
from alignpro.training.loggers.jsonl import read_rows
from alignpro.training.metrics import Evaluation, Metrics
from alignpro.training.run import Run
from alignpro.training.selection import Selection

OBJECTIVES = [0.1, 0.5, 0.4, 0.9, 0.2, 0.3, 0.6]
SPREAD = 0.05
"""Standard error of each, over two prompts; their differences are the same for both prompts."""


class Curve:
    """A trainer whose weight moves each step, and whose objective after each step is given."""

    progress_metrics = ("loss",)

    def __init__(self, config: SelectingSection, stop_at: int | None = None) -> None:
        self.weight = nn.Parameter(torch.tensor([4.0]))
        self.backend = TorchBackend({"w": self.weight}, OptimizerConfig(learning_rate=0.1), config.run.steps)
        self.stop_at = stop_at
        self.trajectory: dict[int, float] = {}

    @property
    def updates(self) -> int:
        return self.backend.updates

    def step(self, step: int) -> Metrics:
        if step == self.stop_at:
            raise KeyboardInterrupt
        self.backend.backward(self.weight.square().sum())
        self.backend.step()
        self.trajectory[step + 1] = self.weight.item()
        return {"loss": 0.0}

    def evaluate(self, step: int) -> Evaluation:
        objective = OBJECTIVES[step]
        return Evaluation({OBJECTIVE: objective}, [objective - SPREAD, objective + SPREAD])

    def save(self, directory: Path) -> dict[str, Any]:
        self.backend.save(directory, "w")
        return {}

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        self.backend.load(directory, "w")

    def export(self, directory: Path) -> None:
        (directory / "weight.json").write_text(json.dumps(self.weight.item()))


def configure(out: Path, **run: Any) -> SelectingSection:
    settings = {"steps": 7, "checkpoint_every": 3, "keep_checkpoints": 1, "eval_every": 2, "tensorboard": False, **run}
    return SelectingSection(run=RunConfig(out=out, **settings), data=DataConfig(source="none", validation=0.1))


def train(config: SelectingSection, *, stop_at: int | None = None, of: type[Curve] = Curve, **how: Any) -> Curve:
    with Run(config, **how) as run:
        trainer = of(config, stop_at)
        run.train(trainer)
    return trainer


def exported(out: Path) -> tuple[float, dict[str, Any]]:
    record: dict[str, Any] = json.loads((out / "model" / "alignpro.json").read_text())
    return json.loads((out / "model" / "weight.json").read_text()), record


def test_the_best_evaluated_step_is_exported_and_recorded(tmp_path: Path) -> None:
    trainer = train(configure(tmp_path))
    weight, record = exported(tmp_path)
    assert weight == trainer.trajectory[4]
    assert record == {
        "step": 7,
        "selected": {
            "step": 4,
            "best": {"step": 4, "objective": pytest.approx(0.9), "error": pytest.approx(SPREAD)},
            "last": {"step": 7, "objective": pytest.approx(0.6), "error": pytest.approx(SPREAD)},  # evaluated, too
            "best_minus_last": {"objective": pytest.approx(0.3), "error": pytest.approx(0.0, abs=1e-12)},
        },
    }
    assert steps_of_checkpoints(tmp_path) == [4, 7]  # the best is kept beside the newest
    evaluated = [row["step"] for row in read_rows(tmp_path / "metrics.jsonl") if OBJECTIVE in row]
    assert evaluated == [2, 4, 6, 7]


def test_the_last_step_is_exported_if_that_is_asked_for(tmp_path: Path) -> None:
    trainer = train(configure(tmp_path, select="last"))
    assert exported(tmp_path) == (trainer.trajectory[7], {"step": 7})
    assert steps_of_checkpoints(tmp_path) == [7]


@pytest.mark.parametrize("stop_at", [1, 2, 4, 5, 6])
def test_a_run_killed_anywhere_selects_the_same(stop_at: int, tmp_path: Path) -> None:
    """An evaluation repeated by the resumed run must not count twice, and one before its start must not be lost."""
    undisturbed = train(configure(tmp_path / "undisturbed"))
    with pytest.raises(KeyboardInterrupt):
        train(configure(tmp_path / "killed"), stop_at=stop_at)
    train(configure(tmp_path / "killed"), resume=True)
    assert exported(tmp_path / "killed") == exported(tmp_path / "undisturbed")
    assert exported(tmp_path / "killed")[0] == undisturbed.trajectory[4]


class Faulty(Curve):
    """Its evaluation of the last step fails, or it is killed before it has exported."""

    fault = "evaluate"

    def evaluate(self, step: int) -> Evaluation:
        if self.fault == "evaluate" and step == 6:
            raise TrainingError("the judge's server is down")
        return super().evaluate(step)

    def export(self, directory: Path) -> None:
        raise KeyboardInterrupt


class Killed(Faulty):
    fault = "export"


@pytest.mark.parametrize("before", ["before the evaluation is saved", "after"])
def test_an_evaluation_that_a_resumed_run_has_made_counts(
    before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation of the last step fails; the run that repeats it is killed, and the next one exports."""
    monkeypatch.setitem(
        globals(), "OBJECTIVES", [*OBJECTIVES[:6], 0.9]
    )  # as good as the best one: the last is exported
    undisturbed, config = configure(tmp_path / "undisturbed"), configure(tmp_path / "run")
    train(undisturbed)
    with pytest.raises(TrainingError, match="server is down"):
        train(config, of=Faulty)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patched:
        if before != "after":
            patched.setattr(Run, "_save", interrupt)
        train(config, of=Killed, resume=True)
    train(config, resume=True)
    assert exported(config.run.out) == exported(undisturbed.run.out)
    assert exported(config.run.out)[1]["selected"]["step"] == 7
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "undisturbed")]
    assert rows[0] == rows[1]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_damaged_best_checkpoint_is_not_selected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configure(tmp_path)
    trainer = train(config)
    shutil.rmtree(tmp_path / "model")
    best = tmp_path / "checkpoints" / "step_000004"
    flip_bit(next(best.glob("*.safetensors")))
    train(config, resume=True)
    assert f"{best}, the best so far, cannot be used" in caplog.text and "checksum" in caplog.text
    assert exported(tmp_path)[0] == trainer.trajectory[7]
    assert exported(tmp_path)[1]["selected"]["best"]["step"] == 7


def test_a_best_checkpoint_that_is_damaged_while_the_run_goes_on_has_a_remedy(tmp_path: Path) -> None:
    class Damaging(Curve):
        def step(self, step: int) -> Metrics:
            if step == 6:
                flip_bit(next((tmp_path / "checkpoints" / "step_000004").glob("*.safetensors")))
            return super().step(step)

    config = configure(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"step_000004 is damaged: .*; continue with --resume, which selects another"
    ):
        train(config, of=Damaging)
    train(config, resume=True)
    assert exported(tmp_path)[1]["selected"]["step"] == 7


def test_going_back_forgets_later_evaluations(tmp_path: Path) -> None:
    config = configure(tmp_path, keep_checkpoints=9)
    train(config)
    shutil.rmtree(tmp_path / "model")
    OBJECTIVES[3], kept = 0.0, OBJECTIVES[3]
    try:
        train(config, resume=True, from_step=3)
    finally:
        OBJECTIVES[3] = kept
    assert exported(tmp_path)[1]["selected"]["best"] == {
        "step": 7,
        "objective": pytest.approx(0.6),
        "error": pytest.approx(SPREAD),
    }


def test_an_objective_that_is_no_number_is_never_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "OBJECTIVES", [float("nan")] * 5 + [0.1, 0.0])
    trainer = train(configure(tmp_path))
    assert exported(tmp_path)[0] == trainer.trajectory[6]


def test_the_last_is_exported_unless_it_is_worse_on_the_same_prompts() -> None:
    """Each estimate has a standard error of 0.5; what counts is that of their difference."""
    best = [0.0, 1.0, 0.0, 1.0]
    for last, step in (
        ([0.1, 0.9, -0.1, 0.9], 20),  # worse by 0.05 ± 0.05
        ([-0.1, 0.9, -0.1, 1.0], 10),  # worse by 0.075 ± 0.025
        ([0.0, 1.0, 0.0, 1.0], 20),
        ([0.0, 2.0, 0.0, 0.0], 20),  # worse by 0 ± 0.41
    ):
        selection = Selection(True)
        selection.add(10, best)
        selection.add(20, last)
        assert (selection.best_step, selection.selected_step) == (10, step), last
        restored = Selection(True)
        restored.load_state_dict(json.loads(json.dumps(selection.state_dict())))
        assert str(restored) == str(selection)
        assert restored.record() == selection.record()
        selection.add(30, [each + 0.5 for each in best])
        restored.add(30, [each + 0.5 for each in best])
        assert selection.selected_step == restored.selected_step == 30
        selection.add(40, [-1.0] * 4)
        assert selection.selected_step == 30


def test_evaluations_of_other_prompts_are_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    """`run.eval_prompts` may change when a run goes on."""
    selection = Selection(True)
    selection.add(10, [0.9] * 4)
    selection.add(20, [0.1, 0.3])
    assert (selection.best_step, selection.selected_step) == (20, 20)
    assert "the best checkpoint so far, of step 10, was evaluated on 4 validation prompts instead of 2" in caplog.text
    selection.add(30, [0.0, 0.0])
    assert selection.selected_step == 20


def test_without_noise_to_compare_with_the_best_is_exported() -> None:
    selection = Selection(True)
    assert selection.selected_step is None
    for step, value in ((1, 0.5), (2, 0.4)):
        selection.add(step, [value])
    assert selection.selected_step == 1
    assert selection.record()["best_minus_last"]["error"] is None


def test_validation_prompts_are_neither_trained_on_nor_reported() -> None:
    prompts = [Prompt.from_text(f"prompt {i}") for i in range(400)]
    without = DataConfig(source="x", holdout=0.2)
    training, evaluated = split_for_training(prompts, without, 10**6)
    assert (training, evaluated) == split(prompts, 0.2)
    reported = evaluated
    training, evaluated = split_for_training(prompts, without.model_copy(update={"validation": 0.1}), 10**6)
    ids = [{prompt.id for prompt in each} for each in (training, evaluated, reported)]
    assert not (ids[0] & ids[1] or ids[1] & ids[2] or ids[0] & ids[2])
    assert sum(map(len, ids)) == 400
    assert 20 < len(evaluated) < 65


def test_selection_by_reported_prompts_is_refused(workshop: Workshop) -> None:
    given = {"run": {"out": "x", "select": "best", "eval_every": 1}, "policy": {"path": "p"}, "target": {"path": "t"}}
    given |= {"reward": {"components": [{"kind": "function", "function": "a:b"}]}, "data": {"source": "d"}}
    with pytest.raises(ConfigError, match=r"run.select=best.*data.validation"):
        validate_config(TrainConfig, given)
    with pytest.raises(ConfigError, match="leave no prompts"):
        validate_config(TrainConfig, given | {"data": {"source": "d", "holdout": 0.5, "validation": 0.5}})
    assert validate_config(TrainConfig, given | {"data": {"source": "d", "validation": 0.1}}).selects_best


@pytest.mark.slow
def test_the_command_exports_the_weights_of_the_selected_checkpoint(workshop: Workshop, tmp_path: Path) -> None:
    """They are those of a run that ends with the selected step."""
    settings = ("data.validation=0.3", "run.eval_every=1", "optimizer.schedule=constant")
    assert workshop.run("train", tmp_path / "whole", *settings, "run.steps=3") == 0
    rows = [row for row in read_rows(tmp_path / "whole" / "metrics.jsonl") if OBJECTIVE in row]
    assert all(row[OBJECTIVE] == pytest.approx(row["eval/reward"] - 0.05 * row["eval/kl"], abs=1e-6) for row in rows)
    selected = json.loads((tmp_path / "whole/model/alignpro.json").read_text())["selected"]
    assert selected["best"]["step"] == max(rows, key=lambda row: row[OBJECTIVE])["step"]
    assert workshop.run("train", tmp_path / "short", *settings, f"run.steps={selected['step']}", "run.select=last") == 0
    assert read_model(tmp_path / "whole") == read_model(tmp_path / "short")
