"""What one launch runs, as its ranks read it from a file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.training.task import Task
from benchmarks.workload import ModelShape, Workload

ALONE = "alone"
"""The set-up without DeepSpeed: plain torch in one process, on the same global batch."""


@dataclass(frozen=True)
class Job:
    """Steps of some set-ups, which take turns."""

    task: Task
    setups: list[str]
    """`ALONE`, or what ``deepspeed.config`` takes."""
    device: str
    threads: int
    """Of a rank."""
    overrides: list[str]
    memory: bool
    """Whether to count what tensors hold: on a CPU that takes so long that the times are worth nothing."""
    out: Path
    """Gets ``RANK.json``."""

    def save(self, path: Path) -> None:
        """Write it for the ranks."""
        path.write_text(json.dumps(asdict(self), default=str))

    @classmethod
    def load(cls, path: Path) -> Job:
        """Read what `save` wrote."""
        given: dict[str, Any] = json.loads(path.read_text())
        workload = given["task"]["workload"]
        shapes = {name: ModelShape(**workload[name]) for name in ("prompter", "target")}
        task = Task(**given["task"] | {"workload": Workload(**workload | shapes)})
        return cls(**given | {"task": replace(task, directory=Path(task.directory)), "out": Path(given["out"])})
