"""Ours and a peer take turns, step by step, so that drifts of the machine's speed affect them alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.measure import SkippedError
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
    skipped: dict[str, dict[str, Any]] = {}

    def take_turn(step: Step) -> None:
        steps["trl"].append(step)
        steps["ours"].append(ours.step(len(steps["ours"])))

    if "trl" in peers:
        try:
            trl.train(task, device, take_turn)
        except SkippedError as error:
            skipped["trl"] = {"status": "skipped", "reason": str(error)}
    for index in range(len(steps["ours"]), task.steps):  # without a peer to take turns with
        steps["ours"].append(ours.step(index))
    chains = task.workload.chains
    return {name: _summary(measured, chains, warmup) for name, measured in steps.items() if measured} | skipped


def _summary(steps: Sequence[Step], chains: int, warmup: int) -> dict[str, Any]:
    timed = steps[warmup:]
    return {
        "status": "measured",
        **median_step([[step] for step in timed], chains),
        "samples": [{"step_s": step.seconds, "phases": step.phases} for step in timed],
        "warmup": [step.seconds for step in steps[:warmup]],
    }
