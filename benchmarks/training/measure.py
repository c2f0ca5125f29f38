"""Ours and a peer take turns, step by step, so that drifts of the machine's speed affect them alike."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from benchmarks.training import trl
from benchmarks.training.ours import OurTraining
from benchmarks.training.step import Step
from benchmarks.training.task import Task

PEERS = ("trl",)


@dataclass
class Entrant:
    """The steps of an entrant, including the warm-up, or the reason why there are none."""

    status: Literal["measured", "skipped"] = "measured"
    reason: str | None = None
    steps: list[Step] = field(default_factory=list)

    def summary(self, chains: int, warmup: int) -> dict[str, Any]:
        """Return the medians over the timed steps and all samples, for JSON."""
        if self.status == "skipped":
            return {"status": self.status, "reason": self.reason}
        timed = self.steps[warmup:]
        step_s = statistics.median(step.seconds for step in timed)
        return {
            "status": self.status,
            "chains_per_s": chains / step_s,
            "step_s": step_s,
            "phases": {name: statistics.median(step.phases[name] for step in timed) for name in timed[0].phases},
            "tokens": timed[-1].tokens,
            "samples": [{"step_s": step.seconds, "phases": step.phases} for step in timed],
            "warmup": [step.seconds for step in self.steps[:warmup]],
        }


def measure(task: Task, device: torch.device, peers: Sequence[str], overrides: Sequence[str]) -> dict[str, Entrant]:
    """Return name → entrant, ``ours`` first; a peer that is not installed is skipped, with the reason."""
    ours = OurTraining(task, device, overrides)
    entrants = {name: Entrant() for name in ("ours", *peers)}

    def take_turn(step: Step) -> None:
        entrants["trl"].steps.append(step)
        entrants["ours"].steps.append(ours.step(len(entrants["ours"].steps)))

    if "trl" in peers:
        reason = trl.missing()
        if reason is None:
            trl.train(task, device, take_turn)
            return entrants
        entrants["trl"] = Entrant("skipped", reason)
    entrants["ours"].steps = [ours.step(index) for index in range(task.steps)]
    return entrants
