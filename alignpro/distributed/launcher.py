"""The rank and world size that a launcher sets in the environment; read before any heavy import."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether a launcher has started this process as a rank of a job."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def launched_rank() -> int:
    """Return the rank that the launcher has set; 0 without a launcher."""
    return int(os.environ["RANK"]) if launched() else 0


def launched_world_size() -> int:
    """Return the number of ranks that the launcher has started; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def launched_here() -> int | None:
    """Return the number of ranks that the launcher has started on this machine; None if it does not say."""
    size = os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE"))  # deepspeed's launcher; torchrun
    return None if size is None else int(size)


def set_rank_from_slurm() -> None:
    """Set RANK, LOCAL_RANK and WORLD_SIZE from Slurm's variables if Slurm tasks are the ranks and these are not set.

    This is the case under ``deepspeed --launcher slurm``. MASTER_ADDR and MASTER_PORT show that a task is meant to be a
    rank: a batch script has Slurm's task variables, too, but is not a rank.
    """
    if launched() or not {"MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"} <= os.environ.keys():
        return
    for name, variable in {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}.items():
        os.environ[name] = os.environ[variable]


def drop_local_rank(arguments: list[str]) -> list[str]:
    """Remove the ``--local_rank=N`` that the deepspeed launcher adds to the arguments; LOCAL_RANK has the same value."""
    return [argument for argument in arguments if not argument.startswith("--local_rank=")]
