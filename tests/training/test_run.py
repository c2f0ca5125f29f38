"""The run directory and the training loop: access, state saved on failures, and messages."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from tiny_runs import Process, Workshop, assert_same, flip_bit, read_metrics, read_model, rows, steps_of_checkpoints
from torch import nn

from alignpro.config import DataConfig, OptimizerConfig, RunConfig, RunSection
from alignpro.errors import AlignProError, CheckpointError, RewardError, TrainingError
from alignpro.training.backend import TorchBackend
from alignpro.training.loggers.jsonl import read_rows
from alignpro.training.metrics import Evaluation, Metrics
from alignpro.training.run import Run

Finished = Callable[..., Path]


class Config(RunSection):
    """The smallest configuration of a run."""

    goal: float = 0.0
    data: DataConfig = DataConfig(source="none")
    table: dict[str, int] = Field(default_factory=lambda: {"rows": 1})


class Descent:
    """A trainer with one weight that draws from torch's global generator, and fails where ``fail`` says."""

    progress_metrics = ("loss",)

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

    def evaluate(self, step: int) -> Evaluation:
        self._maybe_fail("evaluate", step)
        self.evaluated.append(step)
        return Evaluation({"eval/distance": abs(self.weight.item() - self.goal)})

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
        trainer = Descent(config)
        trainer.fail = fail or {}
        run.train(trainer)
    return trainer


@pytest.fixture
def undisturbed(tmp_path: Path) -> Path:
    train(configure(tmp_path / "undisturbed"))
    return tmp_path / "undisturbed"


def steps(out: Path) -> list[tuple[int, bool]]:
    """Return (step, whether it is an evaluation) of each row."""
    return [(row["step"], any(name.startswith("eval/") for name in row)) for row in read_rows(out / "metrics.jsonl")]


ALL_STEPS = [(1, False), (2, False), (3, False), (3, True), (4, False), (5, False), (6, False), (6, True)]


# ------------------------------------------------------------------------------------------------------------ the loop


def test_a_run_writes_its_documented_files(undisturbed: Path) -> None:
    assert sorted(path.name for path in undisturbed.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "model",
        "run.lock",
        "run_id",
    ]
    assert steps_of_checkpoints(undisturbed) == [4, 6]
    assert steps(undisturbed) == ALL_STEPS
    assert read_rows(undisturbed / "metrics.jsonl")[-1]["eval/distance"] < 4


def test_the_seed_determines_the_global_generators(undisturbed: Path, tmp_path: Path) -> None:
    torch.rand(7)
    train(configure(tmp_path / "again"))
    train(configure(tmp_path / "other", seed=1))
    assert read_metrics(tmp_path / "again") == read_metrics(undisturbed)
    assert read_metrics(tmp_path / "other") != read_metrics(undisturbed)


def test_the_last_step_has_a_checkpoint_even_if_none_is_due(tmp_path: Path) -> None:
    train(configure(tmp_path / "run", steps=5, checkpoint_every=2))
    assert steps_of_checkpoints(tmp_path / "run") == [4, 5]


def test_a_run_may_be_made_in_any_thread(undisturbed: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        pool.submit(train, configure(tmp_path / "run")).result()
    assert read_metrics(tmp_path / "run") == read_metrics(undisturbed)


# ------------------------------------------------------------------------------------------------ failures of the task


@pytest.mark.parametrize("at", range(6))
def test_the_state_before_a_step_is_saved_if_it_fails_before_its_update(
    undisturbed: Path, tmp_path: Path, at: int
) -> None:
    """The generators' state is restored too, so that the resumed run is bit-identical."""
    out = tmp_path / "run"
    with pytest.raises(RewardError, match="the judge is out"):
        train(configure(out), fail={("before update", at): RewardError("the judge is out")})
    assert steps_of_checkpoints(out)[-1] == at
    train(configure(out), resume=True)
    assert read_metrics(out) == read_metrics(undisturbed)


@pytest.mark.parametrize("at", range(1, 6))
def test_no_state_is_saved_if_a_step_fails_after_its_update(undisturbed: Path, tmp_path: Path, at: int) -> None:
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="halfway"):
        train(configure(out), fail={("after update", at): RuntimeError("halfway")})
    assert all(step % 2 == 0 for step in steps_of_checkpoints(out))
    train(configure(out), resume=True)
    assert read_metrics(out) == read_metrics(undisturbed)


@pytest.mark.parametrize("at", [2, 5])
def test_a_failed_evaluation_is_repeated_on_resume(
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


def test_a_failed_export_is_repeated_on_resume(tmp_path: Path) -> None:
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


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(
        TrainingError, match=r"is not empty and holds no run \(it has thesis.tex\); name another run.out"
    ):
        Run(configure(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_run_leaves_that_was_killed_before_its_first_step_is_no_obstacle(tmp_path: Path) -> None:
    with Run(configure(tmp_path)):
        pass
    for name in ("servers.json", "ledger.sqlite", "ledger.sqlite-wal"):
        (tmp_path / name).write_text("{}")
    with Run(configure(tmp_path)) as run:
        assert not run.finished


def test_the_directory_of_an_evaluation_is_refused(tmp_path: Path) -> None:
    for name in ("config.yaml", "summary.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(TrainingError, match="is not empty and holds no run"):
        Run(configure(tmp_path))
    assert (tmp_path / "config.yaml").read_text() == "{}"


def test_a_file_in_its_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(TrainingError, match=r"run: is a file; name another run.out"):
        Run(configure(tmp_path / "run"))


def test_an_unwritable_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"file/run: cannot be written: .*; name another run.out"):
        Run(configure(tmp_path / "file" / "run"))


def test_a_run_that_failed_before_its_first_step_can_be_started_again_with_another_configuration(
    tmp_path: Path,
) -> None:
    """For example, with a corrected path of a model. There is no state to lose."""
    with Run(configure(tmp_path / "run", goal=1.0)):
        pass
    train(configure(tmp_path / "run", goal=2.0))
    assert "goal: 2.0" in (tmp_path / "run" / "config.yaml").read_text()


def test_resume_without_a_run_starts_one(undisturbed: Path, tmp_path: Path) -> None:
    """A job that a scheduler restarts can then use the same command each time."""
    train(configure(tmp_path / "run"), resume=True)
    assert read_metrics(tmp_path / "run") == read_metrics(undisturbed)


def test_only_one_process_may_use_a_directory(undisturbed: Path) -> None:
    with (
        Run(configure(undisturbed), resume=True),
        pytest.raises(TrainingError, match=rf"another process \(pid {os.getpid()}\) is training in it; wait for it"),
    ):
        Run(configure(undisturbed), resume=True)
    with Run(configure(undisturbed), resume=True):
        pass


def test_a_failed_start_releases_the_directory(undisturbed: Path) -> None:
    for how in ({"from_step": 5}, {}):
        with pytest.raises(AlignProError):
            Run(configure(undisturbed, goal=0.0 if how else 1.0), resume=True, **how)
    with Run(configure(undisturbed), resume=True) as run:
        assert run.finished


def test_a_changed_configuration_is_refused_and_the_keys_are_named(undisturbed: Path) -> None:
    changed = Config.model_validate(
        {**configure(undisturbed, goal=1.0, seed=3).model_dump(), "table": {"rows": 2, "columns": 1}}
    )
    with pytest.raises(TrainingError) as caught:
        Run(changed, resume=True)
    for part in (
        "goal (was 0.0, is 1.0)",
        "run.seed (was 0, is 3)",
        "table.rows (was 1, is 2)",
        "table.columns (was None, is 1)",
    ):
        assert part in str(caught.value)
    assert "run.steps" not in str(caught.value)
    assert str(undisturbed / "config.yaml") in str(caught.value)


def test_length_checkpoints_and_evaluations_of_a_run_may_change(undisturbed: Path) -> None:
    train(configure(undisturbed, steps=8, checkpoint_every=1, keep_checkpoints=1, eval_every=0), resume=True)
    assert steps(undisturbed) == [*ALL_STEPS, (7, False), (8, False)]
    assert steps_of_checkpoints(undisturbed) == [8]
    assert "steps: 8" in (undisturbed / "config.yaml").read_text()


def test_a_run_of_another_command_is_refused(undisturbed: Path, workshop: Workshop) -> None:
    class Other(RunSection):
        data: DataConfig = DataConfig(source="none")
        model: str

    with pytest.raises(TrainingError, match="the run in it is not one of this command"):
        Run(Other(run=RunConfig(out=undisturbed), model="x"), resume=True)


def test_a_finished_run_is_recognised_without_a_trainer(undisturbed: Path) -> None:
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


def test_fewer_steps_than_completed_are_refused(undisturbed: Path) -> None:
    with pytest.raises(TrainingError, match=r"is at step 6, beyond run.steps=5; raise run.steps, or go back with --at"):
        Run(configure(undisturbed, steps=5), resume=True)
    train(configure(undisturbed, steps=5), resume=True, from_step=4)
    assert steps(undisturbed) == ALL_STEPS[:-2]
    assert steps_of_checkpoints(undisturbed) == [4, 5]


def test_a_step_to_go_back_to_must_exist_undamaged(undisturbed: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step_000003: no such checkpoint; there are: 4, 6"):
        Run(configure(undisturbed), resume=True, from_step=3)
    flip_bit(undisturbed / "checkpoints/step_000004/w.safetensors")
    with pytest.raises(CheckpointError, match=r"step_000004 is damaged: w.safetensors does not match its checksum"):
        Run(configure(undisturbed), resume=True, from_step=4)


def test_missing_wandb_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
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
def test_a_failing_reward_stops_the_run_names_the_prompt_and_saves_the_state(
    workshop: Workshop,
    finished: Finished,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    how: str,
    command: str,
) -> None:
    """Call 2 is in the second step. By the configuration, the first checkpoint is due at step 4."""
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


def test_an_evaluation_whose_reward_failed_is_repeated_on_resume(
    workshop: Workshop, finished: Finished, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with workshop.broken_reward("raise", 3):
        assert workshop.run("train", out, "run.checkpoint_every=4") == 1
    assert steps_of_checkpoints(out) == [2]
    assert rows(out) == 2
    assert workshop.run("train", out, "--resume") == 0
    assert_same(out, finished("train"))


def test_a_loss_that_is_not_finite_stops_the_run_without_saving_bad_weights(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The learning rate is so large that the loss of the second or third step is NaN."""
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


def test_the_command_skips_damaged_checkpoints(
    workshop: Workshop, finished: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = shutil.copytree(finished("train"), tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    flip_bit(out / "checkpoints/step_000004/policy.safetensors")
    (out / "checkpoints/step_000003/random.pt").unlink()
    assert workshop.run("train", out, "--resume") == 0
    assert "step_000004 is damaged (policy.safetensors does not match its checksum)" in caplog.text
    assert "step_000003 is damaged (random.pt is missing)" in caplog.text
    assert_same(out, finished("train"))
    assert steps_of_checkpoints(out) == [1, 2, 3, 4]


def test_only_damaged_checkpoints_are_an_error_of_the_command(
    workshop: Workshop, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished("sft"), tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    for step in (1, 2, 3, 4):
        (out / f"checkpoints/step_00000{step}/manifest.json").write_text("{")
    before = (out / "metrics.jsonl").read_bytes()
    assert workshop.run("sft", out, "--resume") == 1
    assert "every checkpoint is damaged; start again in another run.out" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_full_disk_at_a_checkpoint_loses_nothing(workshop: Workshop, finished: Finished, tmp_path: Path) -> None:
    """A file-size limit stands in for a full disk: the weights of the next checkpoint fit, its optimizer does not."""
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
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 2, 3], "the step before the failure has its row"
    assert workshop.run("sft", out, *job) == 0
    assert_same(out, finished("sft", "optimizer.schedule=constant"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_full_disk_at_another_file_is_reported_and_loses_nothing(
    workshop: Workshop, finished: Finished, tmp_path: Path, name: str
) -> None:
    """As above. A long row in the file makes it the first to reach the limit."""
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


def test_a_place_that_tensorboard_cannot_write_to_is_an_error(
    workshop: Workshop, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished("sft"), tmp_path / "run", ignore=shutil.ignore_patterns("model", "step_000004"))
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
    assert workshop.run(job[0], out, "run.steps=1", "--resume") == 0, "the lock of a dead process remains"


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


def test_a_finished_run_is_reported_without_its_models_or_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
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
