"""What a launcher tells a process of its place among others; read before anything heavy is imported."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether a launcher has started this process as one of a job's."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def launched_rank() -> int:
    """The rank that the launcher gave; 0 without one."""
    return int(os.environ["RANK"]) if launched() else 0


def launched_size() -> int:
    """How many ranks the launcher has started; 1 without one."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def without_local_rank(arguments: list[str]) -> list[str]:
    """Command-line arguments without the ``--local_rank=N`` that the deepspeed launcher puts in; LOCAL_RANK says it too."""
    return [argument for argument in arguments if not argument.startswith("--local_rank=")]
