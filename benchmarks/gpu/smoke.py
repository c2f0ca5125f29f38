"""python -m benchmarks.gpu.smoke: independent checks of everything that a GPU run needs, each with a line and a traceback.

The checks are dealt to a few processes. A check that crashes or hangs ends its process only, and another one takes over
the checks that are left. The results are written after every check.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import hardware
from benchmarks.gpu.checks import CHECKS

SECONDS = 74.0
"""After which checks that have not finished count as failed."""
LANES = 4
"""Processes at most; each also compiles kernels."""

WORKER = (sys.executable, "-m", "benchmarks.gpu.worker")
"""The command that runs checks."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.smoke")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, required=True, help="the results file")
    parser.add_argument("--only", action="append", metavar="CHECK", help="a check; may be repeated")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="the time limit of all together")
    options = parser.parse_args(arguments)
    names = [check.name for check in CHECKS if not options.only or check.name in options.only]
    smoke = Smoke(options.device, options.json, names, options.seconds)
    smoke.run(max(1, min(LANES, (os.cpu_count() or 1) // 2)))
    failed = [name for name in names if smoke.results[name]["status"] == "FAIL"]
    print(f"smoke: {len(names) - len(failed)} of {len(names)} checks without failure", flush=True)
    return int(bool(failed))


class Smoke:
    """A run of checks.

    Args:
        device: ``cuda`` or ``cpu``.
        file: The results file.
        names: The checks, in order.
        seconds: The time limit of all together.
        worker: The command that runs checks, given the device, a file descriptor for events, and names.
    """

    def __init__(
        self, device: str, file: Path, names: Sequence[str], seconds: float, worker: Sequence[str] = WORKER
    ) -> None:
        self._device, self._file, self._names, self._worker = device, file, list(names), worker
        self._ends = time.monotonic() + seconds
        self._lock = threading.Lock()
        self.results: dict[str, dict[str, Any]] = {}

    def run(self, lanes: int) -> None:
        """Run all checks in ``lanes`` processes at a time."""
        threads = [threading.Thread(target=self._lane, args=(self._names[lane::lanes],)) for lane in range(lanes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _lane(self, names: list[str]) -> None:
        left = list(names)
        while left:
            if time.monotonic() >= self._ends:
                for name in left:
                    self._add({"name": name, "status": "FAIL", "detail": "not run: the time was up", "seconds": 0.0})
                return
            left = self._process(left)

    def _process(self, names: list[str]) -> list[str]:
        """Run checks in one process until it ends, and return those that are left."""
        read, write = os.pipe()
        with tempfile.TemporaryFile() as output:
            command = [*self._worker, self._device, str(write), *names]
            worker = subprocess.Popen(command, pass_fds=[write], stdout=output, stderr=output, stdin=subprocess.DEVNULL)
            os.close(write)
            timer = threading.Timer(max(0.0, self._ends - time.monotonic()), worker.kill)
            timer.start()
            left, began, since = list(names), names[0], time.monotonic()
            with os.fdopen(read) as events:
                for line in events:
                    event = json.loads(line)
                    if "begins" in event:
                        began, since = event["begins"], time.monotonic()
                    else:
                        self._add(event)
                        left.remove(event["name"])
            code = worker.wait()
            timer.cancel()
            # It crashed or hung in the middle of a check, or before the first, or ended without having run any.
            if began in left and (code or len(left) == len(names)):
                output.seek(0)
                text = output.read()[-4000:].decode(errors="replace")
                late = "the time was up" if time.monotonic() >= self._ends else f"the process ended with status {code}"
                seconds = round(time.monotonic() - since, 2)
                result = {"name": began, "status": "FAIL", "detail": late, "traceback": text, "seconds": seconds}
                self._add(result)
                left.remove(began)
        return left

    def _add(self, result: dict[str, Any]) -> None:
        with self._lock:
            self.results[result["name"]] = result
            print(f"{result['status']}  {result['name']:27} {result['seconds']:6.1f} s  {result['detail']}", flush=True)
            if text := result.get("traceback"):
                print("".join(f"      {line}\n" for line in text.rstrip().splitlines()), end="", flush=True)
            document = {"commit": hardware.commit(), "card": hardware.gpu(), "checks": list(self.results.values())}
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
