"""An interrupted and resumed run ends like an uninterrupted one: metrics, samples and weights are bit-identical."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny_runs import Process, Workshop, assert_same, read_metrics, read_model, rows, steps_of_checkpoints

from alignpro.config import TrainConfig, load_config
from alignpro.errors import TrainingError
from alignpro.training.resume import check_configuration

Finished = Callable[..., Path]

PPO = ("objective.loss=ppo_clip", "objective.epochs=2", "objective.minibatches=2")
JOBS: dict[str, tuple[str, ...]] = {
    "adaptive KL": ("train", "objective.kl.target=0.001", "objective.kl.horizon=10"),
    "limited steps": ("train", "objective.step_kl=0.0005", "optimizer.schedule=constant"),
    "running baseline": ("train", "objective.advantage=running_baseline", "objective.kl.estimator=k1"),
    "PPO with a critic": ("train", *PPO, "objective.advantage=gae", "objective.gae_lambda=0.9"),
    "GRPO": ("train", *PPO, "objective.advantage=group_normalized", "objective.kl.estimator=k3"),
    "distillation": ("train", "objective.loss=distillation", "objective.epochs=2", "objective.minibatches=2"),
    "Gibbs": ("train", "objective.loss=gibbs", "objective.epochs=2", "objective.minibatches=2"),
    "LoRA": ("train", "policy.adapter.kind=lora", "policy.adapter.rank=2"),
    "soft prompt": ("train", "policy.adapter.kind=soft_prompt", "policy.adapter.virtual_tokens=4"),
    "ahead": ("train", "rollout.ahead=1", "rollout.prompts_per_step=3", "rollout.responses_per_rewrite=2"),
    "self mode": ("train", "policy.adapter.kind=lora", "policy.adapter.activated=true", "target=policy"),
    "SFT of an activated LoRA": ("sft", "policy.adapter.kind=lora", "policy.adapter.activated=true"),
    "bfloat16": ("train", "policy.dtype=bfloat16"),
    "from scratch": ("train", "policy.from_scratch=true"),
    "RLHF": ("rlhf", "objective.entropy_coef=0.01"),
    "RLHF, PPO with a critic": ("rlhf", *PPO, "objective.advantage=gae", "objective.kl.estimator=k2"),
    "SFT": ("sft",),
    "SFT of a LoRA with dropout": ("sft", "policy.adapter.kind=lora", "policy.adapter.dropout=0.5"),
    "SFT of a soft prompt": ("sft", "policy.adapter.kind=soft_prompt", "policy.adapter.virtual_tokens=4"),
    "SFT on responses": ("sft", "task=response", "data.source=${oc.env:PAIRS}"),
    "reward model": ("reward",),
}


@pytest.mark.parametrize(
    ("job", "step"),
    [
        pytest.param(job, step, marks=[] if step == 1 + i % 3 else pytest.mark.slow)
        for i, job in enumerate(JOBS)
        for step in (1, 2, 3)
    ],
)
def test_a_run_resumed_from_a_checkpoint_ends_as_the_undisturbed_one(
    workshop: Workshop, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, step: int
) -> None:
    monkeypatch.setenv("PAIRS", str(workshop.root / "pairs.jsonl"))
    reference, out = finished(*JOBS[job]), tmp_path / "run"
    assert steps_of_checkpoints(reference) == [1, 2, 3, 4]
    assert any(row.get("gradient_norm", 0) > 0 for row in read_metrics(reference))
    shutil.copytree(reference, out)
    assert workshop.run(JOBS[job][0], out, *JOBS[job][1:], "--resume", "--at", str(step)) == 0
    assert_same(out, reference)


def test_the_state_of_the_cache_makes_no_difference(workshop: Workshop, finished: Finished, tmp_path: Path) -> None:
    """For repeated prompts, the base model's pages are in the uninterrupted run's cache but not in the resumed one's."""
    size = ("rollout.prompts_per_step=16", "rollout.rewrites_per_prompt=4", "rollout.rewrite.max_tokens=12")
    job, out = (*JOBS["self mode"][:3], *size, "optimizer.learning_rate=0.02"), tmp_path / "run"
    shutil.copytree(finished(*job), out)
    assert workshop.run(job[0], out, *job[1:], "--resume", "--at", "2") == 0
    assert_same(out, finished(*job))


def test_evaluations_do_not_change_what_is_trained(finished: Finished) -> None:
    """The reward draws from the global random generator."""
    with_evaluations, without = finished("train"), finished("train", "run.eval_every=0")
    training = [row for row in read_metrics(with_evaluations) if not any(name.startswith("eval/") for name in row)]
    assert training == read_metrics(without)
    assert read_model(with_evaluations) == read_model(without)


def test_the_compared_runs_change_the_policy(finished: Finished) -> None:
    first, last = read_metrics(finished("train"))[0], read_metrics(finished("train"))[-2]
    assert abs(first["kl"]) < 1e-6  # passes with and without gradients round differently
    assert last["kl"] > 1e-4
    assert first["kl_coef"] == last["kl_coef"]
    adaptive = read_metrics(finished(*JOBS["adaptive KL"]))
    assert adaptive[0]["kl_coef"] != adaptive[-2]["kl_coef"]


LONG = ("train", "run.steps=60", "run.checkpoint_every=1000", "run.eval_every=7", "optimizer.schedule=constant")


@pytest.mark.parametrize("signum", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_saves_and_exits_and_resume_continues(
    workshop: Workshop, finished: Finished, tmp_path: Path, signum: int
) -> None:
    out = tmp_path / "run"
    process = Process(workshop.arguments(LONG[0], out, *LONG[1:]), tmp_path / "log")
    process.wait_until(lambda: rows(out) >= 2)
    process.signal(signum)
    assert process.wait() == 128 + signum
    assert_stopped_well(out, process.output())
    assert workshop.run(LONG[0], out, *LONG[1:], "--resume") == 0
    assert_same(out, finished(*LONG))


def assert_stopped_well(out: Path, output: str) -> None:
    (step,) = steps_of_checkpoints(out)
    assert 2 <= step < 60
    assert read_metrics(out)[-1]["step"] == step
    assert f"state saved in {out / 'checkpoints'}/step_{step:06d}; continue with --resume" in output
    assert "Traceback" not in output


def test_a_second_signal_kills_at_once_and_the_run_resumes(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\ncalls = 0\n\ndef score(prompts, responses):\n    global calls\n    calls += 1\n"
        "    time.sleep(60 if calls > 2 else 0)\n    return [float(len(set(y))) for y in responses]\n"
    )
    out = tmp_path / "run"
    slow = f"reward.components.0.function={tmp_path}/slow.py:score"
    process = Process(workshop.arguments("rlhf", out, slow, "run.eval_every=0"), tmp_path / "log")
    process.wait_until(lambda: steps_of_checkpoints(out) == [1, 2])
    process.signal(signal.SIGINT)
    process.wait_until(lambda: "stopping after this step" in process.output())
    process.signal(signal.SIGINT)
    assert process.wait(50) == 128 + signal.SIGINT
    assert steps_of_checkpoints(out) == [1, 2]
    (tmp_path / "slow.py").write_text("def score(prompts, responses):\n    return [1.0 for y in responses]\n")
    assert workshop.run("rlhf", out, slow, "run.eval_every=0", "--resume") == 0
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 3, 4]


def kill_and_resume(workshop: Workshop, tmp_path: Path, job: tuple[str, ...], at: int) -> Path | None:
    """Kill a run at its ``at``-th operation on files, then resume it; returns None if it ended before that."""
    out = tmp_path / f"killed_{at}"
    status = Process(workshop.arguments(job[0], out, *job[1:]), tmp_path / "log", kill_at=at).wait()
    if status == 0:
        return None
    assert status == -signal.SIGKILL
    assert workshop.run(job[0], out, *job[1:], "--resume") == 0
    assert list(out.rglob(".*")) == []
    return out


KILLED = ("sft", "run.steps=3", "run.eval_every=2", "run.keep_checkpoints=1", "run.tensorboard=true")


def test_a_run_killed_at_some_file_operations_resumes(workshop: Workshop, finished: Finished, tmp_path: Path) -> None:
    """Kills at every 25th operation on files of the whole run. Most operations belong to saving checkpoints."""
    kills = 0
    for at in range(random.Random(0).randrange(1, 25), 2000, 25):
        out = kill_and_resume(workshop, tmp_path, KILLED, at)
        if out is None:
            break
        kills += 1
        assert_same(out, finished(*KILLED))
    assert kills > 3


@pytest.mark.slow
@pytest.mark.parametrize("job", [KILLED, ("train", *KILLED[1:])], ids=lambda job: job[0])
def test_a_run_killed_at_any_file_operation_resumes(
    workshop: Workshop, finished: Finished, tmp_path: Path, job: tuple[str, ...]
) -> None:
    kills = 0
    for at in range(1, 2000):
        out = kill_and_resume(workshop, tmp_path, job, at)
        if out is None:
            break
        kills += 1
        assert_same(out, finished(*job))
        shutil.rmtree(out)
    assert kills > 100


def test_a_run_killed_repeatedly_at_random_times_resumes(
    workshop: Workshop, finished: Finished, tmp_path: Path
) -> None:
    job = ("train", *LONG[1:], "run.checkpoint_every=2", "run.keep_checkpoints=2")
    out, moments = tmp_path / "run", random.Random(1)
    for _ in range(3):
        process = Process(workshop.arguments(job[0], out, *job[1:], "--resume"), tmp_path / "log")
        before = rows(out)
        process.wait_until(lambda before=before: rows(out) > before + 3)
        time.sleep(moments.uniform(0, 0.05))
        process.signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert workshop.run(job[0], out, *job[1:], "--resume") == 0
    assert_same(out, finished(*LONG))


@pytest.mark.parametrize(
    "tail", [b'{"step": 5, "lo', b'{"step": 4, "prompt": "\xe6\x97', b"\x00" * 100, b'{"step": 9}']
)
def test_a_truncated_last_line_is_dropped(workshop: Workshop, finished: Finished, tmp_path: Path, tail: bytes) -> None:
    reference = finished("train")
    out = shutil.copytree(
        reference, tmp_path / "run", ignore=shutil.ignore_patterns("model", "step_000003", "step_000004")
    )
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (out / name).open("ab") as file:
            file.write(tail)
    assert workshop.run("train", out, "--resume") == 0
    assert_same(out, reference)


def test_going_back_removes_later_checkpoints(workshop: Workshop, finished: Finished, tmp_path: Path) -> None:
    """Otherwise a later --resume would load a checkpoint whose metrics were removed."""
    out = shutil.copytree(finished("train"), tmp_path / "run")
    with workshop.broken_reward("raise", 1):
        assert workshop.run("train", out, "--resume", "--at", "2") == 1
    assert steps_of_checkpoints(out) == [1, 2]
    assert workshop.run("train", out, "--resume") == 0
    assert_same(out, finished("train"))


def test_checkpoints_after_the_resumed_step_do_not_displace_new_ones(
    workshop: Workshop, finished: Finished, tmp_path: Path
) -> None:
    out = shutil.copytree(finished("train"), tmp_path / "run")
    assert workshop.run("train", out, "--resume", "--at", "1", "run.steps=3", "run.keep_checkpoints=2") == 0
    assert steps_of_checkpoints(out) == [2, 3]


def test_a_run_can_be_made_longer(workshop: Workshop, finished: Finished, tmp_path: Path) -> None:
    constant = "optimizer.schedule=constant"
    out = shutil.copytree(finished("train", constant), tmp_path / "run")
    before = read_model(out)
    assert workshop.run("train", out, constant, "run.steps=6", "--resume") == 0
    assert read_model(out) != before
    assert_same(out, finished("train", constant, "run.steps=6"))


def test_a_longer_run_continues_with_its_own_learning_rate(
    workshop: Workshop, finished: Finished, tmp_path: Path
) -> None:
    """The shorter run's schedule ended at 0, which must not be used."""
    linear, out = ("train", "optimizer.schedule=linear"), tmp_path / "run"
    shutil.copytree(finished(*linear), out)
    assert workshop.run(*linear[:1], out, *linear[1:], "run.steps=8", "--resume") == 0
    rates = [row["learning_rate"] for row in read_metrics(out) if "learning_rate" in row]
    of_eight = [0.01 * (8 - step) / (8 - 2) for step in range(4, 8)]  # 2 steps of warm-up
    assert rates[4:] == pytest.approx(of_eight)


def test_how_long_ranks_wait_may_change_and_what_they_compute_may_not(workshop: Workshop, tmp_path: Path) -> None:
    """The error of a rank that waits in vain says to raise it."""
    given, saved = workshop.arguments("train", tmp_path)[1:], tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump(load_config(TrainConfig, given).model_dump(mode="json")))
    check_configuration(saved, load_config(TrainConfig, [*given, "deepspeed.timeout_seconds=60"]))
    with pytest.raises(TrainingError, match=r"differs from .*: deepspeed.config \(was 'z2', is 'z3'\)"):
        check_configuration(saved, load_config(TrainConfig, [*given, "deepspeed.config=z3"]))


def test_the_state_holds_everything_besides_weights(finished: Finished) -> None:
    state = json.loads((finished(*JOBS["adaptive KL"]) / "checkpoints/step_000004/state.json").read_text())
    assert state["step"] == 4
    assert state["task"]["kl"] != {}
    assert {"reference", "data", "baseline", "step_size"} <= state["task"].keys()


def test_limited_steps_are_shortened_in_the_compared_runs(finished: Finished) -> None:
    state = json.loads((finished(*JOBS["limited steps"]) / "checkpoints/step_000002/state.json").read_text())
    assert 0 < state["task"]["step_size"]["factor"] < 1


def test_truncated_pairs_are_counted_per_step(workshop: Workshop, finished: Finished, tmp_path: Path) -> None:
    """This makes the count of a resumed run equal to the uninterrupted one's, even after a failed step."""
    assert workshop.run("sft", tmp_path / "run", "max_tokens=30", "run.steps=2") == 0
    counts = [row["truncated"] for row in read_metrics(tmp_path / "run") if "truncated" in row]
    assert all(0 < count <= 6 for count in counts)
    assert {row["truncated"] for row in read_metrics(finished("sft")) if "truncated" in row} == {0.0}
