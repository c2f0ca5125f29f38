"""The memory that ranks hold at the peaks of a step is within a tenth of the figures of `alignpro plan`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignpro.planning.memory import estimate_memory
from benchmarks.distributed.buckets import write_scaled
from benchmarks.distributed.job import Job
from benchmarks.distributed.launch import launch
from benchmarks.distributed.summary import peaks
from benchmarks.models import num_parameters
from benchmarks.training.ours import configure
from benchmarks.training.task import make_task
from benchmarks.workload import QUICK, reshape

SHAPE = ["prompter=4x256", "target=2x128", "prompts=4", "K=4", "rewrite=24", "prompt=40"]
"""Weights, optimizer states, activations and cache take about equal amounts of memory."""
HALF = ["policy.dtype=bfloat16", "target.dtype=bfloat16"]
CASES = {
    "z0": ("z0", []),
    "z1": ("z1", []),
    "z2": ("z2", []),
    "z3": ("z3", []),
    "z2 in 16 bits": ("z2", HALF),
    "z3 in 16 bits": ("z3", HALF),
    "z3 in several micro-batches": ("z3", ["optimizer.micro_batch_size=4"]),
    "z3 with checkpointing": ("z3", ["policy.gradient_checkpointing=true"]),
    "z3 LoRA": ("z3", ["policy.adapter.kind=lora"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_within_a_tenth_of_measured_memory(case: str, tmp_path: Path) -> None:
    setup, settings = CASES[case]
    workload = reshape(QUICK, SHAPE)
    task = make_task(workload, tmp_path, steps=2, seed=0)  # the optimizer's states exist from the second on
    scaled = str(write_scaled(setup, num_parameters(workload.prompter), tmp_path))
    exact = [f"prompting.max_prompt_tokens={workload.prompter_input}", "rollout.engine.pool_bytes=4000000"]
    job = Job(task, [scaled], "cpu", 1, [*exact, *settings], True, tmp_path / "out")
    found = launch(job, 2)
    need = estimate_memory(configure(task, torch.device("cpu"), job.overrides), scaled, 2)
    shares = peaks(found, scaled, need)["planned_over_measured"]
    assert shares == pytest.approx({"rollout": 1.0, "update": 1.0}, rel=0.1), case
