"""Jobs on two ranks over gloo, started by the deepspeed launcher. Cases share a launch, since each takes seconds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tiny_runs import Workshop, read_metrics

ROOT = Path(__file__).parents[2]

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


def environment() -> dict[str, str]:
    """Return the environment of a launcher: no GPU, one thread per rank, and the packages of this source tree."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def free_port() -> int:
    """Return a port on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(script: Path | str, *arguments: str, ranks: int = 2, directory: Path = ROOT) -> subprocess.Popen[str]:
    """Start a script in a directory on some ranks; their output is in ``stdout``."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks)]
    command += ["--master_port", str(free_port()), str(script), *arguments]
    return subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=directory,
        start_new_session=True,
    )


def run_cases(directory: Path, cases: Sequence[Sequence[str]], ranks: int = 2, worker: str = "worker.py") -> None:
    """Run commands of `alignpro` one after another on the same ranks."""
    path = directory / f"cases_{ranks}.json"
    path.write_text(json.dumps([list(case) for case in cases]))
    process = launch(Path(__file__).with_name(worker), str(path), ranks=ranks)
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output[-6000:]
    assert isinstance(process.args, list)
    port = process.args[process.args.index("--master_port") + 1]
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))  # no shared memory is left behind


def difference(left: Path, right: Path) -> tuple[float, float]:
    """Return the largest difference of two runs' metrics (relative for those above 1) and of their trained weights."""
    metrics = 0.0
    for a, b in zip(read_metrics(left), read_metrics(right), strict=True):
        assert a.keys() == b.keys()
        metrics = max([metrics, *(abs(a[name] - b[name]) / max(1.0, abs(a[name])) for name in a)])
    weights = 0.0
    files = sorted(path.name for path in (left / "model").glob("*.safetensors"))
    assert files and files == sorted(path.name for path in (right / "model").glob("*.safetensors"))
    for name in files:
        one, other = load(left / "model" / name), load(right / "model" / name)
        assert one.keys() == other.keys()
        weights = max([weights, *((one[key] - other[key]).abs().max().item() for key in one)])
    return metrics, weights


def load(path: Path) -> dict[str, Any]:
    """Load the tensors of a file, none of which may be empty."""
    tensors = load_file(path)
    assert all(tensor.numel() for tensor in tensors.values())
    return tensors
