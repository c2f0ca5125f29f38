"""Ours and a peer take turns, step by step, so that drifts of the machine's speed affect them alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.training import trl
from benchmarks.training.ours import OurTraining
from benchmarks.training.step import Step, median_step
from benchmarks.training.task import Task

PEERS = ("trl",)


def compare(
    task: Task, device: torch.device, peers: Sequence[str], overrides: Sequence[str], warmup: int
) -> dict[str, dict[str, Any]]:
    """Return entrant → its medians and samples, ready for JSON, ``ours`` first.

    A peer that is not installed is skipped, with the reason.
    """
    ours = OurTraining(task, device, overrides)
    steps: dict[str, list[Step]] = {name: [] for name in ("ours", *peers)}
    skipped = {name: reason for name in peers if (reason := trl.missing()) is not None}

    def take_turn(step: Step) -> None:
        steps["trl"].append(step)
        steps["ours"].append(ours.step(len(steps["ours"])))

    if "trl" in peers and not skipped:
        trl.train(task, device, take_turn)
    else:
        steps["ours"] = [ours.step(index) for index in range(task.steps)]
    return {
        name: {"status": "skipped", "reason": skipped[name]}
        if name in skipped
        else _summary(measured, task.workload.chains, warmup)
        for name, measured in steps.items()
    }


def _summary(steps: Sequence[Step], chains: int, warmup: int) -> dict[str, Any]:
    timed = steps[warmup:]
    return {
        "status": "measured",
        **median_step([[step] for step in timed], chains),
        "samples": [{"step_s": step.seconds, "phases": step.phases} for step in timed],
        "warmup": [step.seconds for step in steps[:warmup]],
    }
