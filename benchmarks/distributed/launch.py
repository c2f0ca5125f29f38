"""Launch the ranks of a job and read their results."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.distributed.job import Job

ROOT = Path(__file__).parents[2]


class LaunchError(RuntimeError):
    """Raised when a rank failed."""


def launch(job: Job, ranks: int) -> list[dict[str, Any]]:
    """Run a job with the deepspeed launcher and wait for it.

    Returns:
        The results of each rank; see `rank`.

    Raises:
        LaunchError: A rank failed; the message contains the end of the ranks' output.
    """
    job.out.mkdir(parents=True)
    file = job.out / "job.pickle"
    job.save(file)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    command += ["--master_port", str(_free_port()), "--module", "benchmarks.distributed.rank", str(file)]
    done = subprocess.run(command, env=_environment(job), cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        output = (done.stdout + done.stderr).strip()
        raise LaunchError(f"{', '.join(job.setups)} on {ranks} ranks failed:\n{output[-4000:]}")
    return [json.loads((job.out / f"{rank}.json").read_text()) for rank in range(ranks)]


def _environment(job: Job) -> dict[str, str]:
    """Return the launcher's environment: this tree's packages, and on a CPU the requested threads per rank."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if job.device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(job.threads), "CUDA_VISIBLE_DEVICES": ""}
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
