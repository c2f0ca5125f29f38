"""Failures of a job on several ranks: each gives one clear message and no hang, and --resume continues the run."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ROOT, ForkedRanks, ends, ends_badly, launch, run_to_end, workshop
from tiny_models import save_tiny
from tiny_runs import Workshop, rows, steps_of_checkpoints

from alignpro.demo.world import prompt_records, write_records

SCRIPT = ROOT / "launch" / "train_prompter.py"

BROKEN = '''
"""Fails on one rank at its third call, in the way given by ``how``."""
import os, signal, time

calls = 0

def score(prompts, responses, how):
    global calls
    calls += 1
    if calls == 3 and os.environ["RANK"] == "1":
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "raise":
            raise RuntimeError("the judge is out")
        if how == "hang":
            time.sleep(600)
    time.sleep(0.2 if how == "slow" else 0.0)
    return [sum(map(ord, response)) % 17 / 17 for response in responses]
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shop = workshop(tmp_path_factory.mktemp("failures"))
    (shop.root / "broken.py").write_text(BROKEN)
    return shop


def given(made: Workshop, out: Path, how: str, *arguments: str) -> list[str]:
    component = "{kind: function, function: '" + f"{made.root}/broken.py:score" + "', params: {how: " + how + "}}"
    return made.arguments("train", out, f"reward.components=[{component}]", "run.eval_every=0", *arguments)[1:]


def start(made: Workshop, out: Path, how: str, *arguments: str) -> subprocess.Popen[str]:
    return launch(SCRIPT, *given(made, out, how, *arguments))


def test_a_nan_on_one_rank_skips_the_step_on_all(tmp_path: Path) -> None:
    run_to_end(tmp_path, "worker_backend.py", str(tmp_path))
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for case, first in results[0].items():
        assert math.isfinite(first["norms"][0]) and math.isfinite(first["norms"][2]), case
        assert math.isinf(first["norms"][1]), case
        assert first["updates"] == 2, case
        start, skipped, after = first["weights"]
        assert start == skipped != after, case
        assert first["weights"] == results[1][case]["weights"], case
        assert first["norms"][0] == pytest.approx(math.sqrt(3) * 8, rel=1e-2), case  # 1 + 2 + 2 + 3, three times


def assert_killed_in_step_three(out: Path, error: str) -> None:
    assert "in vain" in error and "rank 1" in error and "--resume" in error
    assert steps_of_checkpoints(out) == [1, 2]


def test_a_killed_rank_ends_the_job_and_resume_continues(made: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    started = time.monotonic()
    statuses, output = ForkedRanks(SCRIPT, given(made, out, "kill"), tmp_path).ends()
    assert statuses == [1, -signal.SIGKILL], output[-4000:]
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert_killed_in_step_three(out, error)
    assert time.monotonic() - started < 110  # a minute of waiting, and the time to start
    statuses, output = ForkedRanks(SCRIPT, given(made, out, "kill", "--resume"), tmp_path).ends()
    assert statuses == [0, 0], output[-4000:]  # a third call would be in step 5
    assert rows(out) == 4


@pytest.mark.slow
def test_the_launcher_ends_a_job_of_which_a_rank_is_killed(made: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    started = time.monotonic()
    error, _ = ends_badly(start(made, out, "kill"))
    assert_killed_in_step_three(out, error)
    assert time.monotonic() - started < 110


@pytest.mark.slow
def test_an_error_on_one_rank_is_reported_once_and_the_state_is_saved(made: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "raised"
    error, output = ends_badly(start(made, out, "raise", "run.checkpoint_every=100"))
    assert error.startswith("error: rank 1:") and "the judge is out" in output
    assert steps_of_checkpoints(out) == [2]


def refused(made: Workshop, root: Path, setting: str) -> str:
    """Start a job that must fail before its first step; return its only error message."""
    return ForkedRanks(SCRIPT, made.arguments("train", root / "run", setting)[1:], root).end_badly()


def test_ranks_with_different_data_are_an_error(made: Workshop, tmp_path: Path) -> None:
    """For example, a node has an old copy of a file. The ranks would then take their shares of different lists."""
    for rank in range(2):
        write_records(tmp_path / f"{rank}.jsonl", prompt_records(24, rank, heldout=False))
    error = refused(made, tmp_path, f"data.source={tmp_path}/${{oc.env:RANK}}.jsonl")
    assert "rank 1 has other training data than rank 0" in error


def test_ranks_with_different_models_are_an_error(made: Workshop, tmp_path: Path) -> None:
    for rank in range(2):
        save_tiny("qwen2", tmp_path / f"{rank}", num_hidden_layers=1, seed=rank)
    error = refused(made, tmp_path, f"policy.path={tmp_path}/${{oc.env:RANK}}")
    assert "rank 1 has loaded a different policy or reference than rank 0" in error


@pytest.mark.slow
def test_ranks_with_different_settings_are_an_error(made: Workshop, tmp_path: Path) -> None:
    error = refused(made, tmp_path, "optimizer.learning_rate=0.0${oc.env:RANK}1")
    assert "rank 1 has optimizer.learning_rate=0.011, and rank 0 optimizer.learning_rate=0.001" in error


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_reach_the_others_says_so(rank: int, made: Workshop, tmp_path: Path) -> None:
    job = made.arguments("train", tmp_path / "run", "deepspeed.timeout_seconds=1")[1:]
    error = ForkedRanks(SCRIPT, job, tmp_path, [rank]).end_badly()
    assert f"rank {rank} has not found the others at 127.0.0.1:" in error and "within 1 s" in error


@pytest.mark.slow
def test_a_rank_that_keeps_the_others_waiting_is_named(made: Workshop, tmp_path: Path) -> None:
    error, _ = ends_badly(start(made, tmp_path / "hung", "hang", "deepspeed.timeout_seconds=40"), 300.0)
    assert "rank 0 waited in vain for the others during step 3, reward" in error
    assert "rank 1 entered step 3, reward" in error


def stopped_amid(made: Workshop, out: Path, stop: Callable[[int], None]) -> tuple[int, str]:
    """Call ``stop`` with the launcher's process id after the first step; return the run's exit status and output."""
    process = start(made, out, "slow", "run.steps=1000", "run.checkpoint_every=1000")
    deadline = time.monotonic() + 300
    while rows(out) < 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    stop(process.pid)
    status, errors, output = ends(process)
    assert not errors, output[-4000:]
    return status, output


@pytest.mark.slow
def test_sigterm_saves_before_the_run_stops(made: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    # Like schedulers, send the signal to all processes of the job.
    status, output = stopped_amid(made, out, lambda launcher: os.killpg(launcher, signal.SIGTERM))
    assert status != 0
    assert "stopped by SIGTERM; state saved in" in output
    assert steps_of_checkpoints(out) == [rows(out)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="launchers are watched only on Linux")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_save_and_stop_when_the_launcher_ends(signum: int, made: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "orphaned"
    status, output = stopped_amid(made, out, lambda launcher: os.kill(launcher, signum))
    assert status == -signum
    assert "stopped by SIGTERM; state saved in" in output
    assert steps_of_checkpoints(out) == [rows(out)]
