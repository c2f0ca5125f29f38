"""Other processes that keep the cores busy beside a measurement, as on a shared machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

_SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"
"""Ends by itself when the benchmark has been killed."""


class BusyProcesses:
    """Processes that each use all of a core that they get. They are stopped except within `running`.

    Args:
        count: Number of processes.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> BusyProcesses:
        for _ in range(self.count):
            self._processes.append(subprocess.Popen([sys.executable, "-S", "-c", _SPIN]))
        self._signal(signal.SIGSTOP)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signal(signal.SIGKILL)  # which also ends a stopped process
        for process in self._processes:
            process.wait()
        self._processes.clear()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let them run inside."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def fair_share(self, threads: int) -> float:
        """The share of its quiet throughput that a process with ``threads`` threads gets if all threads get as much time.

        It holds if nothing else runs on the machine, for the cores that this process may run on.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        quiet, beside = min(cores, threads), cores * threads / max(cores, threads + self.count)
        return min(1.0, beside / quiet)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send_signal(number)
