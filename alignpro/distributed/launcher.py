"""The rank and world size that a launcher sets in the environment; read before any heavy import."""

from __future__ import annotations

import os
import re


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


def rank_zero_address() -> str:
    """Return the address on which the other ranks reach rank 0: that of the process group, unless all are on this machine."""
    return "127.0.0.1" if launched_world_size() in (1, launched_here()) else os.environ["MASTER_ADDR"]


def set_rank_from_slurm() -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_SIZE from Slurm's variables if Slurm tasks are the ranks.

    This is the case under ``srun`` and ``deepspeed --launcher slurm``, which do not set RANK. MASTER_ADDR and MASTER_PORT show
    that a task is meant to be a rank: a batch script has Slurm's task variables, too, but is not a rank.
    """
    if launched() or not {"MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"} <= os.environ.keys():
        return
    for name, variable in {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}.items():
        os.environ[name] = os.environ[variable]
    if tasks := os.environ.get("SLURM_STEP_TASKS_PER_NODE"):
        os.environ["LOCAL_SIZE"] = str(_numbers(tasks)[int(os.environ["SLURM_NODEID"])])


def _numbers(text: str) -> list[int]:
    """Expand Slurm's list of numbers, in which ``8(x2),4`` stands for 8, 8 and 4."""
    return [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]


def drop_local_rank(arguments: list[str]) -> list[str]:
    """Remove the ``--local_rank=N`` that the deepspeed launcher adds to the arguments; LOCAL_RANK has the same value."""
    return [argument for argument in arguments if not argument.startswith("--local_rank=")]
