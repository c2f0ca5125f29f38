"""What the variables of launchers say: how many ranks are on this machine, and where the others reach rank 0."""

from __future__ import annotations

import os

import pytest

from alignpro.distributed.launcher import launched_here, rank_zero_address, set_rank_from_slurm


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that is restored, of a task in a group whose first node is node-1."""
    monkeypatch.setattr(os, "environ", {"MASTER_ADDR": "node-1", "MASTER_PORT": "20001"})
    return monkeypatch


def task(rank: int, node: int, tasks: str, total: int) -> None:
    """Set what srun sets for a task of a step."""
    os.environ |= {"SLURM_PROCID": f"{rank}", "SLURM_NODEID": f"{node}", "SLURM_LOCALID": "0"}
    os.environ |= {"SLURM_NTASKS": f"{total}", "SLURM_STEP_TASKS_PER_NODE": tasks}


@pytest.mark.parametrize(("node", "here"), [(0, 8), (1, 8), (2, 4), (3, 1)])
def test_slurm_says_how_many_ranks_are_on_each_node(node: int, here: int, launch: pytest.MonkeyPatch) -> None:
    task(20, node, "8(x2),4,1", 21)
    set_rank_from_slurm()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], launched_here()) == ("20", "21", here)


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({}, "127.0.0.1"),  # without a launcher
        ({"WORLD_SIZE": "8", "LOCAL_SIZE": "8"}, "127.0.0.1"),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, "127.0.0.1"),
        ({"WORLD_SIZE": "32", "LOCAL_SIZE": "8"}, "node-1"),
        ({"WORLD_SIZE": "32"}, "node-1"),  # a launcher that does not say how many are here
    ],
)
def test_the_address_of_rank_zero_is_one_that_all_reach(
    variables: dict[str, str], address: str, launch: pytest.MonkeyPatch
) -> None:
    os.environ |= variables | ({"RANK": "0"} if variables else {})
    assert rank_zero_address() == address


@pytest.mark.parametrize(("tasks", "total", "address"), [("8(x4)", 32, "node-1"), ("8", 8, "127.0.0.1")])
def test_ranks_under_srun_reach_rank_zero(tasks: str, total: int, address: str, launch: pytest.MonkeyPatch) -> None:
    task(0, 0, tasks, total)
    set_rank_from_slurm()
    assert rank_zero_address() == address
