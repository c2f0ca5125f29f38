"""The job of one launch, which its ranks read from a file."""

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
    """Training steps of several set-ups, which take turns."""

    task: Task
    setups: list[str]
    """`ALONE`, or values of ``deepspeed.config``."""
    device: str
    threads: int
    """Threads per rank."""
    overrides: list[str]
    memory: bool
    """Whether to measure tensor memory; on a CPU this is so slow that the times become meaningless."""
    out: Path
    """The directory in which each rank writes ``RANK.json``."""

    def save(self, path: Path) -> None:
        """Write the job for the ranks."""
        path.write_text(json.dumps(asdict(self), default=str))

    @classmethod
    def load(cls, path: Path) -> Job:
        """Read a job written by `save`."""
        given: dict[str, Any] = json.loads(path.read_text())
        workload = given["task"]["workload"]
        shapes = {name: ModelShape(**workload[name]) for name in ("prompter", "target")}
        task = Task(**given["task"] | {"workload": Workload(**workload | shapes)})
        return cls(**given | {"task": replace(task, directory=Path(task.directory)), "out": Path(given["out"])})
