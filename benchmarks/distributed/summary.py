"""Medians of the ranks' results, and the comparison with the memory plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from alignpro.planning.memory import MemoryEstimate
from benchmarks.distributed.job import ALONE
from benchmarks.training.step import Step, median_step

PLANNED = {"rollout": "rollout", "reward": "rollout", "credit": "update", "update": "update"}
"""Phase → the peak in the plan to which it belongs."""


def times(ranks: Sequence[Mapping[str, Any]], setup: str, warmup: int, chains: int) -> dict[str, Any]:
    """Summarise the steps of a set-up; the time of a step is that of the slowest rank.

    Args:
        ranks: The results of each rank; a rank that did not take part in the set-up has none for it.
        setup: The name of the set-up.
        warmup: Number of steps to leave out.
        chains: Number of chains per step.
    """
    taking_part = [[Step(**step) for step in rank[setup]["steps"]] for rank in ranks if setup in rank]
    steps = list(zip(*taking_part, strict=True))
    medians = median_step(steps[warmup:], chains)
    return {
        "ranks": len(taking_part),
        **medians,
        "tokens_per_s": sum(medians["tokens"].values()) / medians["step_s"],
        "samples": [[rank.seconds for rank in step] for step in steps],
    }


def peaks(ranks: Sequence[Mapping[str, Any]], setup: str, need: MemoryEstimate) -> dict[str, Any]:
    """Compare the peak bytes of any rank with the peaks of the plan; includes the parts of the plan."""
    measured = dict.fromkeys(PLANNED.values(), 0)
    phases: dict[str, int] = {}
    for rank in ranks:
        for phase, peak in rank[setup]["peaks"].items():
            phases[phase] = max(peak, phases.get(phase, 0))
            measured[PLANNED[phase]] = max(peak, measured[PLANNED[phase]])
    planned = {"rollout": need.rollout, "update": need.update}
    return {
        "measured": measured,
        "planned": planned,
        "planned_over_measured": {name: planned[name] / measured[name] for name in measured},
        "phases": phases,
        "plan": asdict(need),
    }


def ratios(setups: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the ratios that the project tracks: a ZeRO-2 step over one process, a ZeRO-3 rollout over one of ZeRO-2."""
    found: dict[str, float] = {}
    if {ALONE, "z2"} <= setups.keys():
        found["z2_step_over_alone"] = setups["z2"]["step_s"] / setups[ALONE]["step_s"]
    if {"z2", "z3"} <= setups.keys():
        found["z3_rollout_over_z2"] = setups["z3"]["phases"]["rollout"] / setups["z2"]["phases"]["rollout"]
    return found
