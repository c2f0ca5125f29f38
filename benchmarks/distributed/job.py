"""The job of one launch, which its ranks read from a file."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

from benchmarks.training.task import Task

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
        path.write_bytes(pickle.dumps(self))

    @staticmethod
    def load(path: Path) -> Job:
        """Read a job written by `save`."""
        job: Job = pickle.loads(path.read_bytes())
        return job
