"""Training on two ranks gives the results of one process on the same global batch, with any kind of sharding."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import assert_close_runs, run_cases, workshop

from alignpro.training.loggers.jsonl import read_rows

STEP = ["rollout.prompts_per_step=5", "run.eval_prompts=3", "optimizer.learning_rate=0.0002", "run.tensorboard=false"]
"""Five prompts on two ranks: the ranks have unequal shares and numbers of micro-batches.

AdamW divides a gradient by its size, so where a gradient is near zero, its rounding, which depends on the processor, moves
a weight by a few hundredths of the learning rate. The rate keeps that below the bound, and a wrong gradient far above."""

LORA = ["policy.adapter.kind=lora", "policy.adapter.rank=4", "policy.adapter.target_modules=[q_proj,down_proj,lm_head]"]
ACTIVATED = ["policy.adapter.kind=lora", "policy.adapter.rank=4", "policy.adapter.activated=true"]
SOFT = ["policy.adapter.kind=soft_prompt", "policy.adapter.virtual_tokens=3"]
PPO = ["objective.loss=ppo_clip", "objective.advantage=gae", "objective.minibatches=3", "optimizer.micro_batch_size=2"]
GIBBS = ["objective.loss=gibbs"]
DISTILLATION = ["objective.loss=distillation", "objective.minibatches=2"]

ONE_PASS = ["optimizer.micro_batch_size=64"]
"""The forward pass that computes credit serves the update too."""

LIMITED = ["optimizer.learning_rate=0.01", "objective.step_kl=0.0002"]
"""Each update is shortened to about the length of those of the other cases."""

QUICK = {
    "z2 full": ("train", "z2", LIMITED),
    "z2 full in one pass": ("train", "z2", ONE_PASS),
    "z3 full": ("train", "z3", LIMITED),
    "z3 LoRA, on the head too": ("train", "z3", LORA),
    "z3 RLHF, PPO with a critic": ("rlhf", "z3", PPO),
    "z3 activated LoRA": ("train", "z3", ACTIVATED),
    "z0 RLHF LoRA": ("rlhf", "z0", [*LORA, *LIMITED]),
}
MATRIX = {
    f"{stage} {command} {name}": (command, stage, settings)
    for stage in ("z0", "z1", "z2", "z3")
    for command in ("train", "rlhf")
    for name, settings in {"full": [], "LoRA": LORA}.items()
} | {
    **{f"{stage} in one pass": ("rlhf", stage, ONE_PASS) for stage in ("z0", "z1", "z2", "z3")},
    "z3 soft prompt": ("train", "z3", SOFT),
    "z2 soft prompt": ("train", "z2", SOFT),
    "z2 self mode": ("train", "z2", [*ACTIVATED, "target=policy"]),
    "z3 activated LoRA, PPO with a critic": ("train", "z3", [*ACTIVATED, *PPO]),
    "z3 Gibbs": ("train", "z3", GIBBS),
    "z2 distillation": ("train", "z2", DISTILLATION),
    "z3 LoRA, PPO with a critic": ("rlhf", "z3", [*LORA, *PPO]),
    "z2 by tokens, running baseline": (
        "train",
        "z2",
        ["objective.normalize_by=token", "objective.advantage=running_baseline", "objective.kl.target=0.1"],
    ),
    "z2 offload": ("train", "z2_offload", LIMITED),
    "z3 offload": ("train", "z3_offload", LIMITED),
    "z3 offload, PPO with a critic": ("rlhf", "z3_offload", PPO),
    "z3 gradient checkpointing": ("rlhf", "z3", ["policy.gradient_checkpointing=true"]),
}


def check(root: Path, cases: dict[str, tuple[str, str, list[str]]], steps: int) -> None:
    """Run every case on two ranks and in this process and compare; all samples must come from the current policy."""
    made = workshop(root)
    length = [f"run.steps={steps}", f"run.checkpoint_every={steps}"]

    def arguments(command: str, out: Path, settings: list[str]) -> list[str]:
        return made.arguments(command, out, *STEP, *length, *settings)

    run_cases(
        root,
        [
            arguments(command, root / f"ranks {name}", [*settings, f"deepspeed.config={stage}"])
            for name, (command, stage, settings) in cases.items()
        ],
    )
    settings_of = {name: settings for name, (_, _, settings) in cases.items()}
    singles: dict[tuple[str, ...], Path] = {}
    for name, (command, _, settings) in cases.items():
        single = singles.setdefault((command, *settings), root / f"single {len(singles)}")
        if not single.exists():
            assert made.run(command, single, *STEP, *length, *settings) == 0
        assert_close_runs(single, root / f"ranks {name}")
        rows = zip(
            read_rows(root / f"ranks {name}" / "metrics.jsonl"), read_rows(single / "metrics.jsonl"), strict=True
        )
        for row, expected in rows:
            assert row.get("sample/logprob_difference_max", 0.0) < 1e-4, name
            assert "kl_step" not in row or (row["learning_rate_factor"] < 0.5) == (LIMITED[1] in settings_of[name]), (
                name
            )
            # A prompt's prefix may be computed on both ranks; its samples are not.
            assert row.get("engine/computed/decode") == expected.get("engine/computed/decode"), name


def test_two_ranks_give_the_results_of_one_process(tmp_path: Path) -> None:
    check(tmp_path, QUICK, steps=3)


@pytest.mark.slow
def test_every_stage_job_and_adapter(tmp_path: Path) -> None:
    check(tmp_path, MATRIX, steps=20)
