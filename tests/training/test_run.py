"""The run directory and the loop: who may use it, what is saved when something fails, and what is said."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from tiny_runs import Process, Workshop, assert_same, flip_bit, read_metrics, read_model, rows, steps_of_checkpoints
from torch import nn

from alignpro.config import OptimizerConfig, RunConfig, Section
from alignpro.errors import AlignProError, CheckpointError, RewardError, TrainingError
from alignpro.training.backend import TorchBackend
from alignpro.training.metrics import Metrics, read_rows
from alignpro.training.run import Run

Finished = Callable[..., Path]


class Config(Section):
    """The least that a run needs."""

    run: RunConfig
    goal: float = 0.0
    data: dict[str, int] = Field(default_factory=lambda: {"rows": 1})


class Descent:
    """A task of one weight that draws from torch's global generator; fails where it is told to."""

    headline = ("loss",)

    def __init__(self, config: Config) -> None:
        self.weight = nn.Parameter(torch.tensor([4.0]))
        self.backend = TorchBackend({"w": self.weight}, OptimizerConfig(learning_rate=0.1), config.run.steps)
        self.goal = config.goal
        self.fail: dict[tuple[str, int], Exception] = {}
        self.evaluated: list[int] = []

    @property
    def updates(self) -> int:
        return self.backend.updates

    def step(self, step: int) -> Metrics:
        noise = torch.randn(1)
        self._maybe_fail("before update", step)
        loss = (self.weight - self.goal + 0.1 * noise).square().sum()
        self.backend.backward(loss)
        norm = self.backend.step()
        self._maybe_fail("after update", step)
        return {"loss": loss.item(), "gradient_norm": norm}

    def evaluate(self, step: int) -> Metrics:
        self._maybe_fail("evaluate", step)
        self.evaluated.append(step)
        return {"eval/distance": abs(self.weight.item() - self.goal)}

    def save(self, directory: Path) -> dict[str, Any]:
        self.backend.save(directory, "w")
        return {}

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        self.backend.load(directory, "w")

    def export(self, directory: Path) -> None:
        self._maybe_fail("export", 0)
        (directory / "weight.json").write_text(json.dumps(self.weight.tolist()))

    def _maybe_fail(self, where: str, step: int) -> None:
        if (where, step) in self.fail:
            raise self.fail[where, step]


def configure(out: Path, goal: float = 0.0, **run: Any) -> Config:
    settings = {"steps": 6, "checkpoint_every": 2, "eval_every": 3, "tensorboard": False, **run}
    return Config(run=RunConfig(out=out, **settings), goal=goal)


def train(config: Config, *, fail: dict[tuple[str, int], Exception] | None = None, **how: Any) -> Descent:
    with Run(config, **how) as run:
        task = Descent(config)
        task.fail = fail or {}
        run.train(task)
    return task


@pytest.fixture
def undisturbed(tmp_path: Path) -> Path:
    train(configure(tmp_path / "undisturbed"))
    return tmp_path / "undisturbed"


def steps(out: Path) -> list[tuple[int, bool]]:
    """(step, whether it is a row of an evaluation)."""
    return [(row["step"], any(name.startswith("eval/") for name in row)) for row in read_rows(out / "metrics.jsonl")]


ALL_STEPS = [(1, False), (2, False), (3, False), (3, True), (4, False), (5, False), (6, False), (6, True)]


# ------------------------------------------------------------------------------------------------------------ the loop


def test_a_run_leaves_what_it_says(undisturbed: Path) -> None:
    assert sorted(path.name for path in undisturbed.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "model",
        "run.lock",
    ]
    assert steps_of_checkpoints(undisturbed) == [4, 6]
    assert steps(undisturbed) == ALL_STEPS
    assert read_rows(undisturbed / "metrics.jsonl")[-1]["eval/distance"] < 4


def test_the_seed_decides_what_global_generators_draw(undisturbed: Path, tmp_path: Path) -> None:
    torch.rand(7)
    train(configure(tmp_path / "again"))
    train(configure(tmp_path / "other", seed=1))
    assert read_metrics(tmp_path / "again") == read_metrics(undisturbed)
    assert read_metrics(tmp_path / "other") != read_metrics(undisturbed)


def test_there_is_a_checkpoint_at_the_end_also_between_two(tmp_path: Path) -> None:
    train(configure(tmp_path / "run", steps=5, checkpoint_every=2))
    assert steps_of_checkpoints(tmp_path / "run") == [4, 5]


# ------------------------------------------------------------------------------------------- failures of what it runs


@pytest.mark.parametrize("at", range(6))
def test_a_step_that_fails_before_its_update_is_saved_as_it_began(undisturbed: Path, tmp_path: Path, at: int) -> None:
    """Bit for bit: what the failing step had drawn from the generators is taken back."""
    out = tmp_path / "run"
    with pytest.raises(RewardError, match="the judge is out"):
        train(configure(out), fail={("before update", at): RewardError("the judge is out")})
    assert steps_of_checkpoints(out)[-1] == at
    train(configure(out), resume=True)
    assert read_metrics(out) == read_metrics(undisturbed)


@pytest.mark.parametrize("at", range(1, 6))
def test_a_step_that_fails_after_its_update_is_not_saved(undisturbed: Path, tmp_path: Path, at: int) -> None:
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="halfway"):
        train(configure(out), fail={("after update", at): RuntimeError("halfway")})
    assert all(step % 2 == 0 for step in steps_of_checkpoints(out))
    train(configure(out), resume=True)
    assert read_metrics(out) == read_metrics(undisturbed)


@pytest.mark.parametrize("at", [2, 5])
def test_an_evaluation_that_fails_is_made_up_for(
    undisturbed: Path, tmp_path: Path, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    with pytest.raises(RewardError):
        train(configure(out), fail={("evaluate", at): RewardError("the judge is out")})
    assert steps_of_checkpoints(out)[-1] == at + 1
    assert f"the state after step {at + 1} is in" in caplog.text
    with pytest.raises(RewardError):
        train(configure(out), resume=True, fail={("evaluate", at): RewardError("still out")})
    train(configure(out), resume=True)
    assert steps(out) == ALL_STEPS
    assert read_metrics(out) == read_metrics(undisturbed)


def test_an_evaluation_is_not_repeated(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(configure(out, steps=3))
    assert train(configure(out, steps=5), resume=True).evaluated == []
    assert steps(out) == ALL_STEPS[:-2]


def test_a_failed_export_is_made_up_for_by_resume(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(CheckpointError, match=r"run/model: cannot be written: .*No space.*make room, then --resume"):
        train(configure(out), fail={("export", 0): OSError(28, "No space left on device")})
    assert not (out / "model").exists()
    train(configure(out), resume=True)
    assert (out / "model" / "weight.json").is_file()
    assert steps(out) == ALL_STEPS


def test_out_of_memory_says_what_to_lower(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"out of memory after step 2: .*; lower optimizer.micro_batch_size"):
        train(configure(tmp_path / "run"), fail={("before update", 2): torch.OutOfMemoryError("3 GiB")})
    assert steps_of_checkpoints(tmp_path / "run") == [2]


# ---------------------------------------------------------------------------------------------------- the run directory


def test_a_directory_that_holds_a_run_is_not_overwritten(undisturbed: Path) -> None:
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file() and path.name != "run.lock"}
    with pytest.raises(TrainingError, match=r"undisturbed: holds a run already; continue it with --resume, or name"):
        Run(configure(undisturbed))
    assert {path: path.read_bytes() for path in before} == before


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(
        TrainingError, match=r"is not empty and holds no run \(it has thesis.tex\); name another run.out"
    ):
        Run(configure(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_evaluation_s_directory_is_left_alone(tmp_path: Path) -> None:
    for name in ("config.yaml", "summary.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(TrainingError, match="is not empty and holds no run"):
        Run(configure(tmp_path))
    assert (tmp_path / "config.yaml").read_text() == "{}"


def test_a_file_in_its_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(TrainingError, match=r"run: is a file; name another run.out"):
        Run(configure(tmp_path / "run"))


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"file/run: cannot be written: .*; name another run.out"):
        Run(configure(tmp_path / "file" / "run"))


def test_a_run_that_failed_before_its_first_step_can_be_started_again_with_another_configuration(
    tmp_path: Path,
) -> None:
    """Such as with the right path of a model: there is nothing to lose."""
    with Run(configure(tmp_path / "run", goal=1.0)):
        pass
    train(configure(tmp_path / "run", goal=2.0))
    assert "goal: 2.0" in (tmp_path / "run" / "config.yaml").read_text()


def test_resume_where_there_is_no_run_starts_one(undisturbed: Path, tmp_path: Path) -> None:
    """So that a job that a scheduler starts again and again has one command."""
    train(configure(tmp_path / "run"), resume=True)
    assert read_metrics(tmp_path / "run") == read_metrics(undisturbed)


def test_one_process_at_a_time(undisturbed: Path) -> None:
    with (
        Run(configure(undisturbed), resume=True),
        pytest.raises(TrainingError, match=rf"another process \(pid {os.getpid()}\) is training in it; wait for it"),
    ):
        Run(configure(undisturbed), resume=True)
    with Run(configure(undisturbed), resume=True):
        pass


def test_a_failed_start_lets_the_directory_go(undisturbed: Path) -> None:
    for how in ({"at": 5}, {}):
        with pytest.raises(AlignProError):
            Run(configure(undisturbed, goal=0.0 if how else 1.0), resume=True, **how)
    with Run(configure(undisturbed), resume=True) as run:
        assert run.finished


def test_another_configuration_is_refused_by_key(undisturbed: Path) -> None:
    changed = Config.model_validate(
        {**configure(undisturbed, goal=1.0, seed=3).model_dump(), "data": {"rows": 2, "columns": 1}}
    )
    with pytest.raises(TrainingError) as caught:
        Run(changed, resume=True)
    for part in (
        "goal (was 0.0, is 1.0)",
        "run.seed (was 0, is 3)",
        "data.rows (was 1, is 2)",
        "data.columns (was None, is 1)",
    ):
        assert part in str(caught.value)
    assert "run.steps" not in str(caught.value)
    assert str(undisturbed / "config.yaml") in str(caught.value)


def test_what_the_run_writes_and_when_may_change(undisturbed: Path) -> None:
    train(configure(undisturbed, steps=8, checkpoint_every=1, keep_checkpoints=1, eval_every=0), resume=True)
    assert steps(undisturbed) == [*ALL_STEPS, (7, False), (8, False)]
    assert steps_of_checkpoints(undisturbed) == [8]
    assert "steps: 8" in (undisturbed / "config.yaml").read_text()


def test_a_run_of_another_command_is_refused(undisturbed: Path, workshop: Workshop) -> None:
    class Other(Section):
        run: RunConfig
        model: str

    with pytest.raises(TrainingError, match="the run in it is not one of this command"):
        Run(Other(run=RunConfig(out=undisturbed), model="x"), resume=True)


def test_a_finished_run_is_known_without_a_task(undisturbed: Path) -> None:
    made = (undisturbed / "model").stat().st_mtime_ns
    with Run(configure(undisturbed), resume=True) as run:
        assert run.finished
        run.train(Descent(configure(undisturbed)))
    assert (undisturbed / "model").stat().st_mtime_ns == made


def test_a_finished_run_needs_no_checkpoints(undisturbed: Path) -> None:
    shutil.rmtree(undisturbed / "checkpoints")
    with Run(configure(undisturbed), resume=True) as run:
        assert run.finished
    with pytest.raises(CheckpointError, match="no checkpoint, although the run has made its model"):
        Run(configure(undisturbed, steps=9), resume=True)


def test_fewer_steps_than_were_made_are_refused(undisturbed: Path) -> None:
    with pytest.raises(TrainingError, match=r"is at step 6, beyond run.steps=5; raise run.steps, or go back with --at"):
        Run(configure(undisturbed, steps=5), resume=True)
    train(configure(undisturbed, steps=5), resume=True, at=4)
    assert steps(undisturbed) == ALL_STEPS[:-2]
    assert steps_of_checkpoints(undisturbed) == [4, 5]


def test_a_step_to_go_back_to_must_be_there_and_whole(undisturbed: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step_000003: no such checkpoint; there are: 4, 6"):
        Run(configure(undisturbed), resume=True, at=3)
    flip_bit(undisturbed / "checkpoints/step_000004/w.safetensors")
    with pytest.raises(CheckpointError, match=r"step_000004 is damaged: w.safetensors does not match its checksum"):
        Run(configure(undisturbed), resume=True, at=4)


def test_wandb_is_missed_before_anything_is_made(tmp_path: Path) -> None:
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(AlignProError, match="needs Weights & Biases"):
            Run(configure(tmp_path / "run", wandb_project="p"))
        assert not (tmp_path / "run").exists()
    else:
        pytest.skip("Weights & Biases is installed")


# -------------------------------------------------------------------------------------------------- through the command


@pytest.mark.parametrize("how", ["raise", "nan", "count"])
@pytest.mark.parametrize("command", ["train", "rlhf"])
def test_a_reward_that_fails_stops_with_the_prompt_and_the_state_saved(
    workshop: Workshop,
    finished: Finished,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    how: str,
    command: str,
) -> None:
    """Call 2 is of the second step; the checkpoint of step 1 is due by configuration no sooner than at step 4."""
    job, out = ("run.checkpoint_every=4",), tmp_path / "run"
    with workshop.broken_reward(how, 2):
        assert workshop.run(command, out, *job) == 1
    output = capsys.readouterr().err
    expected = {"raise": "the judge is out", "nan": "returned nan", "count": "returned 3 values for 4 responses"}
    assert f"error: reward 'score' {'raised' if how == 'raise' else ''}" in output
    assert expected[how] in output
    assert "prompts.jsonl:" in output, "the offending prompt's file and line"
    assert "Traceback" not in output
    assert steps_of_checkpoints(out) == [1]
    assert workshop.run(command, out, *job, "--resume") == 0
    assert_same(out, finished(command))


def test_a_reward_that_fails_at_an_evaluation_is_made_up_for(
    workshop: Workshop, finished: Finished, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with workshop.broken_reward("raise", 3):
        assert workshop.run("train", out, "run.checkpoint_every=4") == 1
    assert steps_of_checkpoints(out) == [2]
    assert rows(out) == 2
    assert workshop.run("train", out, "--resume") == 0
    assert_same(out, finished("train"))


def test_a_loss_that_is_not_finite_stops_and_poisons_nothing(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate beyond all measure: the loss of the second or third step is NaN."""
    out = tmp_path / "run"
    assert workshop.run("sft", out, "optimizer.learning_rate=1e30", "optimizer.warmup_steps=0") == 1
    output = capsys.readouterr().err
    assert "error: the loss is nan after" in output or "error: the gradient's norm is" in output
    assert "lower optimizer.learning_rate" in output
    assert "Traceback" not in output
    last = steps_of_checkpoints(out)[-1]
    assert last == rows(out) - sum("eval/loss" in row for row in read_metrics(out))
    weights = load_file(out / f"checkpoints/step_{last:06d}/model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_damage_is_passed_over_by_the_command(
    workshop: Workshop, finished: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished("train"), out, ignore=shutil.ignore_patterns("model"))
    flip_bit(out / "checkpoints/step_000004/policy.safetensors")
    (out / "checkpoints/step_000003/random.pt").unlink()
    assert workshop.run("train", out, "--resume") == 0
    assert "step_000004 is damaged (policy.safetensors does not match its checksum)" in caplog.text
    assert "step_000003 is damaged (random.pt is missing)" in caplog.text
    assert_same(out, finished("train"))
    assert steps_of_checkpoints(out) == [1, 2, 3, 4]


def test_nothing_but_damage_is_an_error_of_the_command(
    workshop: Workshop, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished("sft"), out, ignore=shutil.ignore_patterns("model"))
    for step in (1, 2, 3, 4):
        (out / f"checkpoints/step_00000{step}/manifest.json").write_text("{")
    before = (out / "metrics.jsonl").read_bytes()
    assert workshop.run("sft", out, "--resume") == 1
    assert "every checkpoint is damaged; start again in another run.out" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_full_disk_at_a_checkpoint_loses_nothing(workshop: Workshop, finished: Finished, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the first checkpoint's weights fit, the optimizer does not."""
    out = tmp_path / "run"
    assert workshop.run("sft", out, "run.steps=2", "optimizer.schedule=constant") == 0
    shutil.rmtree(out / "model")
    optimizer = (out / "checkpoints/step_000002/model_optimizer.pt").stat().st_size
    job = ("optimizer.schedule=constant", "--resume")
    process = Process(workshop.arguments("sft", out, *job), tmp_path / "log", largest_file=optimizer - 1000)
    assert process.wait() == 1
    assert f"error: checkpoint {out}/checkpoints/step_000003: cannot be written: " in process.output()
    assert "File too large" in process.output()
    assert "Traceback" not in process.output()
    assert steps_of_checkpoints(out) == [1, 2]
    assert not list((out / "checkpoints").glob(".*"))
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 2, 3], "the step was made and told of"
    assert workshop.run("sft", out, *job) == 0
    assert_same(out, finished("sft", "optimizer.schedule=constant"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_full_disk_at_another_file_is_told_and_loses_nothing(
    workshop: Workshop, finished: Finished, tmp_path: Path, name: str
) -> None:
    """As above; a long row that stands in the file already makes it the first to reach the limit."""
    job = ("train", "run.eval_every=0", "optimizer.schedule=constant")
    out = tmp_path / "run"
    assert workshop.run(job[0], out, *job[1:], "run.steps=2") == 0
    shutil.rmtree(out / "model")
    limit = max(path.stat().st_size for path in (out / "checkpoints").rglob("*")) + 1000
    padding = json.dumps({"step": 1, "padding": "x" * (limit - 200)}) + "\n"
    (out / name).write_text(padding + (out / name).read_text())
    before = (out / name).read_bytes()
    process = Process(workshop.arguments(job[0], out, *job[1:], "--resume"), tmp_path / "log", largest_file=limit)
    assert process.wait() == 1
    assert f"error: {out / name}: cannot be written: " in process.output()
    assert "File too large" in process.output()
    assert "--resume" in process.output()
    assert "Traceback" not in process.output()
    assert (out / name).read_bytes() == before
    assert steps_of_checkpoints(out) == [1, 2]
    (out / name).write_text((out / name).read_text().partition("\n")[2])
    assert workshop.run(job[0], out, *job[1:], "--resume") == 0
    assert_same(out, finished(*job))


def test_a_place_that_tensorboard_cannot_write_to_is_told(
    workshop: Workshop, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished("sft"), out, ignore=shutil.ignore_patterns("model", "step_000004"))
    (out / "tensorboard").write_text("a file")
    assert workshop.run("sft", out, "run.tensorboard=true", "--resume") == 1
    assert f"error: {out}/tensorboard/events" in capsys.readouterr().err
    assert workshop.run("sft", out, "run.tensorboard=false", "--resume") == 0
    assert_same(out, finished("sft"))


def test_two_processes_do_not_share_a_directory(workshop: Workshop, finished: Finished, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = ("train", "run.steps=100000", "run.checkpoint_every=100000")
    first = Process(workshop.arguments(job[0], out, *job[1:]), tmp_path / "first")
    first.wait_until(lambda: rows(out) >= 1)
    second = Process(workshop.arguments(job[0], out, *job[1:], "--resume"), tmp_path / "second")
    assert second.wait() == 1
    assert "is training in it" in second.output()
    before = rows(out)
    first.wait_until(lambda: rows(out) > before + 1)
    first.signal(9)
    first.wait()
    assert workshop.run(job[0], out, "run.steps=1", "--resume") == 0, "a lock dies with its process"


def test_other_data_is_refused_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "workshop").mkdir()
    workshop, out = Workshop(tmp_path / "workshop"), tmp_path / "run"
    assert workshop.run("sft", out) == 0
    workshop.write_data(seed=1)
    assert workshop.run("sft", out, "run.steps=6", "--resume") == 1
    assert "the training data is not what this run started with" in capsys.readouterr().err
    assert rows(out) == 6
    assert steps_of_checkpoints(out) == [1, 2, 3, 4]


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_another_reference_is_refused_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: str
) -> None:
    (tmp_path / "workshop").mkdir()
    workshop, out = Workshop(tmp_path / "workshop"), tmp_path / "run"
    job = (f"policy.adapter.kind={adapter}",)
    assert workshop.run("train", out, *job) == 0
    before = read_model(out)
    shutil.copytree(workshop.root / "prompter", tmp_path / "kept")
    path = workshop.root / "prompter" / "model.safetensors"
    weights = load_file(path)
    name = next(each for each in weights if "mlp" in each)
    weights[name] = weights[name] * 1.001
    save_file(weights, path, metadata={"format": "pt"})
    assert workshop.run("train", out, *job, "run.steps=6", "--resume") == 1
    assert "the reference model has changed since this run started" in capsys.readouterr().err
    assert read_model(out) == before


def test_a_finished_run_answers_without_its_models_or_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "workshop").mkdir()
    workshop, out = Workshop(tmp_path / "workshop"), tmp_path / "run"
    assert workshop.run("train", out) == 0
    before = {path: path.stat().st_mtime_ns for path in (out / "model").rglob("*")}
    shutil.rmtree(workshop.root / "prompter")
    (workshop.root / "prompts.jsonl").unlink()
    with caplog.at_level("INFO"):
        assert workshop.run("train", out, "--resume") == 0
    assert f"the run in {out} has finished: its model is in {out / 'model'}" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (out / "model").rglob("*")} == before
