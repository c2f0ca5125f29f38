"""The processes that a measurement of the proxy consists of: a target, the proxy before it, and clients; and their CPU time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil


@contextmanager
def target(latency: float) -> Iterator[tuple[str, psutil.Process]]:
    """A target that answers after this many seconds: its base URL and process."""
    arguments = [sys.executable, "-m", "benchmarks.serving.upstream", str(latency)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), psutil.Process(process.pid)
        finally:
            process.terminate()


@contextmanager
def proxy(
    target: str, runs: Sequence[Path] = (), keys: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[tuple[str, psutil.Process]]:
    """The command, with these keys of its configuration: its base URL and process.

    Its log of requests goes to a pipe that nobody reads if it is not sent elsewhere.
    """
    arguments = [sys.executable, "-m", "alignpro", "serve", *map(str, runs), "--target", target, "--port", "0"]
    overrides = [f"{key}={json.dumps(value)}" for key, value in {**keys, "log.file": "/dev/null"}.items()]
    arguments += [word for each in overrides for word in ("--config", each)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines = iter(process.stderr.readline, "")
            found = next(filter(None, (re.search(r"serving (http://\S+)", line) for line in lines)), None)
            assert found is not None, "the proxy ended before it served"
            yield found[1], psutil.Process(process.pid)
        finally:
            process.terminate()


@dataclass(frozen=True)
class CPUSeconds:
    """The CPU time of a process's threads so far. In the proxy, the first one serves HTTP, and another one is the engine's."""

    first_thread: float
    other_threads: float

    @classmethod
    def of(cls, process: psutil.Process) -> CPUSeconds:
        """Measure it."""
        seconds = {thread.id: float(thread.user_time + thread.system_time) for thread in process.threads()}
        first = seconds.pop(process.pid)
        return cls(first, sum(seconds.values()))

    def __sub__(self, other: CPUSeconds) -> CPUSeconds:
        return CPUSeconds(self.first_thread - other.first_thread, self.other_threads - other.other_threads)

    @property
    def total(self) -> float:
        return self.first_thread + self.other_threads


def chat(text: str, **fields: Any) -> dict[str, Any]:
    """The body of a request."""
    return {"model": "bench", "messages": [{"role": "user", "content": text}], **fields}


def load(
    url: str, bodies: Sequence[dict[str, Any]], concurrency: int, seconds: float, latency: float
) -> dict[str, Any]:
    """Send these chats in turn, again from the first after the last, from closed loops: see `benchmarks.serving.load`."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(list(bodies), file)
        file.flush()
        numbers = map(str, (concurrency, seconds, latency))
        arguments = [sys.executable, "-m", "benchmarks.serving.load", url, file.name, *numbers]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]
