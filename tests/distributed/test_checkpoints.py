"""A run on two ranks resumes from a checkpoint as if it had not stopped; on another number of ranks, up to rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import ForkedRanks, assert_close_runs, load, run_cases, run_to_end, workshop
from tiny_runs import assert_same
from transformers import AutoModelForCausalLM

COMMON = ["rollout.prompts_per_step=5", "run.eval_every=0", "run.checkpoint_every=2", "optimizer.learning_rate=0.0005"]
LORA = ["policy.adapter.kind=lora", "policy.adapter.rank=4"]
PPO = ["objective.loss=ppo_clip", "objective.advantage=gae", "objective.minibatches=2"]
CASES = {
    "z2 full": ("train", ["deepspeed.config=z2"]),
    "z3 LoRA": ("train", ["deepspeed.config=z3", *LORA]),
}
MORE = {
    "z0 full": ("rlhf", ["deepspeed.config=z0"]),
    "z1 PPO": ("rlhf", ["deepspeed.config=z1", *PPO]),
    "z2 LoRA": ("train", ["deepspeed.config=z2", *LORA]),
    "z3 PPO": ("rlhf", ["deepspeed.config=z3", *PPO]),
}


def check(root: Path, cases: dict[str, tuple[str, list[str]]]) -> None:
    made = workshop(root)
    two: list[list[str]] = []
    one: list[list[str]] = []
    for name, (command, settings) in cases.items():
        whole, again, fewer = root / f"whole {name}", root / f"again {name}", root / f"fewer {name}"
        two.append(made.arguments(command, whole, *COMMON, *settings))
        two += [["copy", str(whole), str(again)], ["copy", str(whole), str(fewer)]]
        two.append([*made.arguments(command, again, *COMMON, *settings), "--at=2"])
        one.append([*made.arguments(command, fewer, *COMMON, *settings), "--at=2"])
    run_cases(root, two)
    run_cases(root, one, ranks=1)
    for name in cases:
        assert_same(root / f"again {name}", root / f"whole {name}")
        assert_close_runs(root / f"whole {name}", root / f"fewer {name}")


@pytest.mark.slow
def test_a_run_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    check(tmp_path, CASES)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "whole z2 full" / "model")
    assert exported.num_parameters() > 0


@pytest.mark.slow
def test_every_stage_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    check(tmp_path, MORE)


SELECTING = ["rollout.prompts_per_step=3", "run.eval_every=1", "run.checkpoint_every=1", "data.validation=0.2"]
SELECTING += ["run.select=best", "optimizer.learning_rate=0.0005"]
BY_RANKS = '''
"""Prefers what two ranks have made, so that the best checkpoint is theirs."""
import os

def score(prompts, responses):
    return [float(os.environ["WORLD_SIZE"]) + sum(map(ord, response)) % 17 / 1700 for response in responses]
'''


@pytest.mark.slow
def test_the_selected_checkpoint_may_be_of_another_number_of_ranks_than_the_newest(tmp_path: Path) -> None:
    made = workshop(tmp_path)
    (tmp_path / "reward.py").write_text(BY_RANKS)
    two: list[list[str]] = []
    one: list[list[str]] = []
    for stage in ("z2", "z3"):
        out, given = tmp_path / stage, [*SELECTING, f"deepspeed.config={stage}"]
        two += [made.arguments("train", out, *given, "run.steps=1"), ["copy", str(out), f"{out} by two"]]
        one += [[*made.arguments("train", out, *given, f"run.steps={steps}"), f"--at={steps - 1}"] for steps in (2, 3)]
    run_cases(tmp_path, two)
    run_cases(tmp_path, one, ranks=1)
    for stage in ("z2", "z3"):
        out = tmp_path / stage
        assert json.loads((out / "checkpoints" / "step_000003" / "state.json").read_text())["ranks"] == 1
        assert json.loads((out / "model" / "alignpro.json").read_text())["selected"]["step"] == 1
        exported, expected = (
            load(each / "model" / "model.safetensors") for each in (out, tmp_path / f"{stage} by two")
        )
        assert exported.keys() == expected.keys()
        for name, weight in exported.items():
            assert (weight - expected[name]).abs().max().item() < 1e-6, (stage, name)
        assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_a_rank_that_cannot_read_the_converted_checkpoint_ends_the_job_and_says_why(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_000001"
    run_to_end(tmp_path, "worker_universal.py", "save", str(checkpoint), ranks=1)
    worker = Path(__file__).with_name("worker_universal.py")
    statuses, output = ForkedRanks(worker, ["load", str(checkpoint)], tmp_path).ends()
    assert statuses[1] == 1 and statuses[0] != 0, output[-4000:]
    first = next(line for line in output.splitlines() if line.startswith("error:"))
    assert first.startswith("error: rank 1, in startup:") and "OSError: Input/output error" in output, output[-4000:]
