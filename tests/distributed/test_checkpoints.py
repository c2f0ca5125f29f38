"""A run on two ranks resumes from a checkpoint as if it had not stopped; on another number of ranks, up to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import assert_close_runs, run_cases, workshop
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
