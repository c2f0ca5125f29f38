"""Jobs on some ranks over gloo: started by the deepspeed launcher, or forked from a process that has imported everything.

A launch takes many seconds of imports, so only tests of launching use the launcher, and cases share the forked ranks.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from forked_ranks import ROOT, Job, environment, serve_jobs
from safetensors.torch import load_file
from tiny_runs import Workshop, fork, read_metrics

DEEPSPEED = Path(sys.executable).with_name("deepspeed")

REWARD = '''
"""Depends on every letter of the response, and on nothing else."""

def score(prompts, responses):
    return [sum(map(ord, response)) % 17 / 17 for response in responses]
'''


def workshop(root: Path) -> Workshop:
    """Create models, data, configurations, and a reward that gives the same values on all ranks."""
    made = Workshop(root)
    (root / "reward.py").write_text(REWARD)
    return made


def free_port() -> int:
    """Return a port on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(
    script: Path | str, *arguments: str, ranks: int = 2, directory: Path = ROOT, **variables: str
) -> subprocess.Popen[str]:
    """Start a script in a directory on some ranks; their output is in ``stdout``."""
    common = ["--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return begin([DEEPSPEED, *common, script, *arguments], directory, **variables)


def begin(command: Sequence[str | Path], directory: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
    """Start a launcher in a process group of its own."""
    return subprocess.Popen(
        [str(part) for part in command],
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=directory,
        start_new_session=True,
    )


def ends(process: subprocess.Popen[str], within: float = 120.0) -> tuple[int, list[str], str]:
    """Wait for a job; return its exit status, the error lines of `alignpro`, and all output."""
    try:
        output, _ = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, [line for line in output.splitlines() if line.startswith("error:")], output


def ends_well(process: subprocess.Popen[str], within: float = 1800.0) -> None:
    """Wait for a job, which must succeed."""
    status, _, output = ends(process, within)
    assert status == 0, output[-6000:]


def ends_badly(process: subprocess.Popen[str], within: float = 120.0) -> tuple[str, str]:
    """Wait for a job, which must fail with one error message; return that, and all output."""
    status, errors, output = ends(process, within)
    assert status != 0, output[-4000:]
    assert len(errors) == 1, output[-4000:]
    return errors[0], output


class ForkedRanks:
    """A program on all ranks of a job, in processes that have what the launcher gives them.

    Args:
        program: A Python file, which runs as ``__main__``.
        arguments: Its arguments, after those of the launcher.
        directory: For the ranks' output.
        ranks: Which ranks are started.
        size: How many ranks the job has.
    """

    def __init__(
        self, program: Path, arguments: Sequence[str], directory: Path, ranks: Sequence[int] = (0, 1), size: int = 2
    ) -> None:
        self.port = str(free_port())
        self._job = Job(program, list(arguments), directory, list(ranks), size, self.port)

    def ends(self, within: float = 300.0) -> tuple[list[int], str]:
        """Run all ranks; return their exit statuses and output. As under the launcher, a failure ends the others."""
        launcher = _launcher()
        launcher.send((self._job, within))
        statuses: list[int] = launcher.recv()
        logs = map(self._job.log, self._job.ranks)
        return statuses, "".join(log.read_text(errors="replace") for log in logs if log.exists())

    def end_badly(self) -> str:
        """Run the ranks, which must all exit with an error, of which one rank says why; return its message."""
        statuses, output = self.ends()
        errors = [line for line in output.splitlines() if line.startswith("error:")]
        assert set(statuses) == {1}, output[-4000:]
        assert len(errors) == 1 and "Traceback" not in output, output[-4000:]
        return errors[0]


@cache
def _launcher() -> Any:
    """Start the process that forks ranks; return a connection that takes jobs and gives the ranks' exit statuses."""
    ours, theirs = Pipe()
    fork(serve_jobs, Path(tempfile.mkdtemp()) / "launcher.txt", theirs, daemon=True)
    theirs.close()
    return ours


def run_to_end(directory: Path, worker: str, *arguments: str, ranks: int = 2) -> None:
    """Run a worker's program on some ranks, which must succeed."""
    job = ForkedRanks(Path(__file__).with_name(worker), arguments, directory, range(ranks), ranks)
    statuses, output = job.ends(within=1800.0)
    assert not any(statuses), output[-6000:]
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{job.port}_*"))  # no shared memory is left behind


def run_cases(directory: Path, cases: Sequence[Sequence[str]], ranks: int = 2, worker: str = "worker.py") -> None:
    """Run commands of `alignpro` one after another on the same ranks."""
    path = directory / f"cases_{ranks}.json"
    path.write_text(json.dumps([list(case) for case in cases]))
    run_to_end(directory, worker, str(path), ranks=ranks)


def assert_close_runs(left: Path, right: Path) -> None:
    """Check that two runs have the same metrics (relative for those above 1) and trained weights, up to 1e-5."""
    for a, b in zip(read_metrics(left), read_metrics(right), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            # A regression on log-ratios amplifies their rounding while they are small; so small, they weigh as little. The
            # factor of a step follows a KL of 1e-4 nats, whose rounding depends on the processor's BLAS.
            bound = {"kl_sampled_share": 0.05, "learning_rate_factor": 1e-4}.get(name, 1e-5)
            assert abs(a[name] - b[name]) / max(1.0, abs(a[name])) < bound, (right.name, name)
    files = sorted(path.name for path in (left / "model").glob("*.safetensors"))
    assert files and files == sorted(path.name for path in (right / "model").glob("*.safetensors"))
    for file in files:
        one, other = load(left / "model" / file), load(right / "model" / file)
        assert one.keys() == other.keys()
        for name in one:
            assert (one[name] - other[name]).abs().max().item() < 1e-5, (right.name, name)


def load(path: Path) -> dict[str, Any]:
    """Load the tensors of a file, none of which may be empty."""
    tensors = load_file(path)
    assert all(tensor.numel() for tensor in tensors.values())
    return tensors
