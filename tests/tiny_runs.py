"""Runs small enough for tests: models of a few thousand weights, and hundredths of a second per step.

`Workshop` writes models, data, a reward and a configuration file for each command to disk, and runs `alignpro` on them.
`Process` runs `alignpro` in another process.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import save_tiny

from alignpro import __main__
from alignpro.cli import main
from alignpro.demo.world import prompt_records, prompter_records, target_records, write_records
from alignpro.training.metrics import EXECUTION_METRICS

REWARD = '''
"""Depends on every letter and on the global random generator, and fails as the file `broken` says."""
import random
from pathlib import Path

calls = 0

def score(prompts, responses):
    global calls
    calls += 1
    noise = random.random()
    broken = Path(__file__).with_name("broken")
    how, _, when = broken.read_text().partition(" ") if broken.exists() else ("", "", "")
    if how and calls >= int(when):
        if how == "raise":
            raise RuntimeError("the judge is out")
        if how == "nan":
            return [0.5] * (len(responses) - 1) + [float("nan")]
        if how == "count":
            return [0.5] * (len(responses) - 1)
    return [sum(map(ord, response)) % 17 / 17 + noise for response in responses]
'''


class Workshop:
    """A directory with everything that the commands need.

    Args:
        root: An empty directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        save_tiny("llama", root / "target", num_hidden_layers=1)
        save_tiny("qwen2", root / "prompter", num_hidden_layers=1)
        self.write_data()
        (root / "reward.py").write_text(REWARD)
        for name, config in self._configs().items():
            (root / f"{name}.yaml").write_text(yaml.safe_dump(config))

    def write_data(self, seed: int = 0) -> None:
        """Write prompts, pairs and preferences."""
        write_records(self.root / "prompts.jsonl", prompt_records(24, seed, heldout=False))
        write_records(self.root / "rewrites.jsonl", prompter_records(24, seed))
        pairs = [
            {**row, "chosen": row["response"], "rejected": "huh?"} for row in target_records(24, seed, careless=False)
        ]
        write_records(self.root / "pairs.jsonl", pairs)

    def run(self, command: str, out: Path | str, *arguments: str) -> int:
        """Run a command in this process; returns its exit status."""
        try:
            main(self.arguments(command, out, *arguments))
        except SystemExit as stop:
            return int(stop.code or 0)
        raise AssertionError("main returns by SystemExit")

    def arguments(self, command: str, out: Path | str, *arguments: str) -> list[str]:
        """Return the arguments of ``alignpro``."""
        return [command, str(self.root / f"{command}.yaml"), f"run.out={out}", *arguments]

    @contextmanager
    def broken_reward(self, how: str, call: int) -> Iterator[None]:
        """Make the reward fail from its ``call``-th call in a process on: it raises, returns a NaN or a wrong count."""
        marker = self.root / "broken"
        marker.write_text(f"{how} {call}")
        try:
            yield
        finally:
            marker.unlink()

    def _configs(self) -> dict[str, dict[str, Any]]:
        run = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 9, "eval_every": 2, "eval_prompts": 2}
        run |= {"sample_every": 1, "tensorboard": False}
        optimizer = {"learning_rate": 0.01, "warmup_steps": 2, "schedule": "cosine", "micro_batch_size": 4}
        reward = {"components": [{"kind": "function", "function": f"{self.root}/reward.py:score"}]}
        prompter = {"path": str(self.root / "prompter"), "device": "cpu"}
        target = {"path": str(self.root / "target"), "device": "cpu"}
        data = {"source": str(self.root / "prompts.jsonl"), "holdout": 0.2}
        drawn = {"max_tokens": 4}
        return {
            "train": {
                "run": run,
                "data": data,
                "policy": prompter,
                "target": target,
                "reward": reward,
                "rollout": {"prompts_per_step": 2, "rewrites_per_prompt": 2, "rewrite": drawn, "respond": drawn},
                "optimizer": optimizer,
            },
            "rlhf": {
                "run": run,
                "data": data,
                "policy": target,
                "reward": reward,
                "rollout": {"prompts_per_step": 2, "responses_per_prompt": 2, "respond": drawn},
                "optimizer": optimizer,
            },
            "sft": {
                "run": run,
                "data": data | {"source": str(self.root / "rewrites.jsonl")},
                "policy": prompter,
                "optimizer": optimizer,
                "batch_size": 6,
            },
            "reward": {
                "run": run,
                "data": data | {"source": str(self.root / "pairs.jsonl")},
                "model": target,
                "optimizer": optimizer,
                "batch_size": 4,
            },
        }


def read_metrics(out: Path) -> list[dict[str, float]]:
    """Return the rows of metrics.jsonl without the metrics that depend on the clock or the cache."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(EXECUTION_METRICS)} for row in rows]


def read_model(out: Path) -> dict[str, bytes]:
    """Return the weight files of the trained model."""
    return {path.name: path.read_bytes() for path in sorted((out / "model").glob("*.safetensors"))}


def assert_same(out: Path, reference: Path) -> None:
    """Check that metrics, samples and trained weights are bit-identical."""
    assert read_metrics(out) == read_metrics(reference)
    assert read_model(out) == read_model(reference)
    samples = "samples.jsonl"
    assert (out / samples).exists() == (reference / samples).exists()
    if (reference / samples).exists():
        assert (out / samples).read_bytes() == (reference / samples).read_bytes()


def assert_near(out: Path, reference: Path) -> None:
    """Check that metrics and samples are equal up to the rounding of another processor."""
    assert_near_values(read_metrics(out), read_metrics(reference))
    samples = [each / "samples.jsonl" for each in (out, reference)]
    assert samples[0].exists() == samples[1].exists()
    if samples[0].exists():
        assert_near_values(*([json.loads(line) for line in path.read_text().splitlines()] for path in samples))


def assert_near_values(made: Any, expected: Any, place: str = "") -> None:
    """Check that nested lists and mappings hold the expected values, numbers up to rounding; other keys may be new."""
    if isinstance(expected, dict):
        assert expected.keys() <= made.keys(), place
        for key in expected:
            assert_near_values(made[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(made) == len(expected), place
        for i, pair in enumerate(zip(made, expected, strict=True)):
            assert_near_values(*pair, f"{place}.{i}")
    elif isinstance(expected, float):
        assert made == pytest.approx(expected, rel=1e-4, abs=1e-5), place
    else:
        assert made == expected, place


def rows(out: Path) -> int:
    """Return the number of rows in metrics.jsonl so far."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def steps_of_checkpoints(out: Path) -> list[int]:
    """Return the steps that have a checkpoint."""
    return sorted(int(path.name.removeprefix("step_")) for path in (out / "checkpoints").glob("step_*"))


def flip_bit(path: Path, place: float = 0.5) -> None:
    """Flip one bit at the relative position ``place`` of a file."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


class Process:
    """`alignpro` in a separate process, forked from one that has imported everything.

    Args:
        arguments: The arguments of ``alignpro``.
        log: File for its standard output and standard error.
        kill_at: Number of the operation on files below ``run.out`` (opening, renaming, removing, …) at which it dies by
            SIGKILL.
        largest_file: Limit of file sizes in bytes; writing beyond it fails as on a full disk.
    """

    def __init__(
        self, arguments: Sequence[str], log: Path, *, kill_at: int | None = None, largest_file: int | None = None
    ) -> None:
        self.log = log
        self._process = fork(_child, log, list(arguments), kill_at, largest_file)

    def signal(self, signum: int) -> None:
        """Send a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signum)

    def wait_until(self, condition: Callable[[], bool], timeout: float = 300.0) -> None:
        """Poll until a condition holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self._process.is_alive(), f"the process ended first: {self.output()}"
            assert time.monotonic() < deadline, f"timeout: {self.output()}"
            time.sleep(0.005)

    def wait(self, timeout: float = 300.0) -> int:
        """Return the exit status; negative for a signal."""
        self._process.join(timeout)
        status = self._process.exitcode
        assert status is not None, f"the process hangs: {self.output()}"
        return status

    def output(self) -> str:
        """Return its output so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def fork(function: Callable[..., None], log: Path, *arguments: Any, daemon: bool = False) -> Any:
    """Start a function in a process forked from one that has imported everything, and return the process.

    Args:
        function: A function of a module.
        log: File for its standard output and standard error.
        arguments: The function's arguments.
        daemon: Whether it ends with this process.
    """
    process = _context().Process(target=_begin, args=(function, log, arguments), daemon=daemon)
    process.start()
    return process


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["alignpro.training.jobs", "tiny_runs"])
    before = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _begin(function: Callable[..., None], log: Path, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell inherit SIGINT ignored
    torch.set_num_threads(1)
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    function(*arguments)


def _child(arguments: list[str], kill_at: int | None, largest_file: int | None) -> None:
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    if kill_at is not None:
        out = next(a.removeprefix("run.out=") for a in arguments if a.startswith("run.out="))
        sys.addaudithook(_Killer(out, kill_at))
    sys.argv = ["alignpro", *arguments]
    __main__.main()


class _Killer:
    """An audit hook that ends the process, as ``kill -9`` does, at a certain operation on files."""

    def __init__(self, directory: str, at: int) -> None:
        self.directory, self.at, self.seen = directory, at, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree") and str(
            arguments[0]
        ).startswith(self.directory):
            self.seen += 1
            if self.seen == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
