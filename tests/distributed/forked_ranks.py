"""The process that stands for the launcher: it has imported DeepSpeed, and forks the ranks of one job after another."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parents[2]

GRACE = 30.0
"""Seconds that the other ranks have once one has failed."""


@dataclass(frozen=True)
class Job:
    """A program on some ranks; see `launching.ForkedRanks`."""

    program: Path
    arguments: list[str]
    directory: Path
    ranks: list[int]
    size: int
    port: str

    def log(self, rank: int) -> Path:
        """Return the file of a rank's output."""
        return self.directory / f"output_{self.port}_{rank}.txt"

    def variables(self, rank: int) -> dict[str, str]:
        """Return what the launcher sets."""
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port}
        sizes = {"WORLD_SIZE": str(self.size), "LOCAL_SIZE": str(self.size)}
        return place | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def environment() -> dict[str, str]:
    """Return the environment of a launcher: no GPU, one thread per rank, and the packages of this source tree."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def serve_jobs(connection: Connection) -> None:
    """Run the jobs that come until the other end closes; answer each with the exit statuses of its ranks."""
    os.environ.update(environment())
    import alignpro.training.deepspeed_backend
    import alignpro.training.jobs  # noqa: F401 - before the fork, so that the ranks share it
    from alignpro.distributed.deepspeed.compilation import compile_operators

    compile_operators(offload=False)
    while True:
        try:
            job, seconds = connection.recv()
        except EOFError:
            return
        connection.send(_run_job(job, seconds))


def _run_job(job: Job, seconds: float) -> list[int]:
    """Run the ranks for some seconds at most; return their exit statuses, negative for signals."""
    running = {_fork_rank(job, rank): rank for rank in job.ranks}
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while running:
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                code = statuses[running.pop(child)] = os.waitstatus_to_exitcode(status)
                deadline = min(deadline, time.monotonic() + GRACE) if code else deadline
        if time.monotonic() > deadline:
            for child in running:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[rank] for rank in job.ranks]


def _fork_rank(job: Job, rank: int) -> int:
    """Return the process id of a rank, which runs the program and exits with its status."""
    if child := os.fork():
        return child
    status = 1
    try:
        with job.log(rank).open("ab") as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
        status = _run_program(job.program, job.arguments, job.variables(rank))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run_program(program: Path, arguments: list[str], variables: Mapping[str, str]) -> int:
    """Run a Python file as ``__main__``; return its exit status."""
    os.environ.update(variables)
    sys.argv = [str(program), *arguments]
    sys.path.insert(0, str(program.parent))
    try:
        runpy.run_path(str(program), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
