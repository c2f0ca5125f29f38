"""Ranks as processes over gloo under DeepSpeed, forked after the imports: all issue the same collectives in the same order."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from launching import assert_close_runs, run_to_end, workshop
from tiny_runs import Workshop

SHORT = ["run.steps=1", "run.checkpoint_every=1", "run.eval_every=1", "run.tensorboard=false"]
PPO = ["objective.loss=ppo_clip", "objective.advantage=gae", "objective.minibatches=3"]


def run_forked(size: int, directory: Path, cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Run the cases on forked ranks; returns what each rank wrote."""
    (directory / "cases.json").write_text(json.dumps(cases))
    run_to_end(directory, "worker_forked.py", str(directory), ranks=size)
    return [json.loads((directory / f"rank_{rank}.json").read_text()) for rank in range(size)]


def case(made: Workshop, out: Path, *settings: str, disk_full_on: int | None = None) -> dict[str, Any]:
    _, *arguments = made.arguments("train", out, *SHORT, *settings)
    return {"arguments": arguments, "disk_full_on": disk_full_on}


def check(size: int, root: Path, names: Sequence[str]) -> None:
    """Every rank has one or two prompts of a step, some minibatches none, and not all of them a prompt of the evaluation."""
    made = workshop(root)
    prompts, full = size + 1, size // 2
    step = [f"rollout.prompts_per_step={prompts}", "optimizer.micro_batch_size=2", "optimizer.learning_rate=0.0002"]
    settings: dict[str, list[str]] = {
        "z2": [*step, "deepspeed.config=z2"],
        "z3": [*step, *PPO, "deepspeed.config=z3", "deepspeed.target_stage=3"],
        "more prompts": [*step, f"rollout.prompts_per_step={2 * prompts}", "deepspeed.config=z2"],
    }
    cases = [case(made, root / name, *settings[name]) for name in names]
    cases.append(case(made, root / "full", *settings["z3"], disk_full_on=full))
    ranks = run_forked(size, root, cases)

    for number, name in enumerate([*names, "full"]):
        for rank in ranks:
            assert name == "full" or rank[number]["error"] is None, name
            assert rank[number]["calls"] == ranks[0][number]["calls"], name
    if "more prompts" in names:
        fewer, more = (of_the_step(ranks[0][names.index(name)]["calls"]) for name in ("z2", "more prompts"))
        assert fewer == more and fewer["step 1, rollout", "all_gather_object"] == 1

    for name in names:
        single = root / f"single {name}"
        local = [each for each in settings[name] if not each.startswith("deepspeed.")]
        assert made.run("train", single, *SHORT, *local) == 0
        assert_close_runs(single, root / name)

    for rank, outcomes in enumerate(ranks):
        kind, message, together = outcomes[-1]["error"]
        assert together
        assert kind == ("CheckpointError" if rank == full else "PeerError"), message
        assert rank != full or ("step_000001: cannot be written" in message and "make room" in message)
    assert not list((root / "full" / "checkpoints").glob("*"))


def of_the_step(calls: list[list[str]]) -> Counter[tuple[str, str]]:
    """Count, by phase and name, the calls of a step that are not DeepSpeed's."""
    return Counter((phase, name) for phase, name, whose, _ in calls if whose == "own" and phase.startswith("step "))


def test_three_ranks(tmp_path: Path) -> None:
    check(3, tmp_path, [])


@pytest.mark.slow
def test_eight_ranks(tmp_path: Path) -> None:
    check(8, tmp_path, ["z2", "z3", "more prompts"])
