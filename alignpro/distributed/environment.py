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


def take_slurm_rank() -> None:
    """Take this process's place from Slurm, where its tasks are the ranks and nobody has told them so.

    So it is under ``deepspeed --launcher slurm``. MASTER_ADDR and MASTER_PORT say that a task is meant to be a rank: a
    batch script has a place among tasks too, and is none.
    """
    if launched() or not {"MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"} <= os.environ.keys():
        return
    for name, told in {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}.items():
        os.environ[name] = os.environ[told]


def without_local_rank(arguments: list[str]) -> list[str]:
    """Command-line arguments without the ``--local_rank=N`` that the deepspeed launcher puts in; LOCAL_RANK says it too."""
    return [argument for argument in arguments if not argument.startswith("--local_rank=")]
