"""Run what needs a GPU: smoke checks, the tests marked gpu, and benchmarks; each part alone, with a time limit.

    python -m benchmarks.gpu [PART…] [--only PART]… [--device cuda|cpu] [--tiny] [--out DIR] [--results DIR] [--logs DIR]

Parts are smoke, tests, kernels, engine and training, by default all. A part that fails, hangs or crashes does not stop
the later ones. Results go to benchmarks/results/<device>/; DIR gets one archive of them and of all logs, and a summary. Both are
kept up to date, so that a run that is cut leaves what it had. This file imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import hardware
from benchmarks.gpu import archive, summary
from benchmarks.gpu.parts import PARTS, Command, Place, environment
from benchmarks.gpu.process import Ended, run
from benchmarks.hardware import ROOT

KEEP_SECONDS = 10.0
"""The archive is at most this old."""


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module; returns the exit status."""
    options = _options(arguments)
    place = Place(options.device, options.tiny, options.results or _results(options.device, options.tiny))
    for number in (signal.SIGTERM, signal.SIGHUP):  # ends the part, keeps what there is
        signal.signal(number, lambda *_: sys.exit(143))
    keeper = Run(place, options.out.resolve(), options.logs.resolve(), options.parts)
    try:
        for part in keeper.parts:
            for command in PARTS[part](place):
                keeper.run(part, command)
    finally:
        keeper.finish()
    return int(any(each["status"] != "ok" for each in keeper.ended.values()))


class Run:
    """The commands of a run, what became of them, and the files that keep it.

    Args:
        place: Where it takes place.
        out: The folder of archive and summary.
        logs: The folder of the logs, which is emptied.
        parts: The parts to run.
    """

    def __init__(self, place: Place, out: Path, logs: Path, parts: list[str]) -> None:
        self._place, self._out, self._logs, self.parts = place, out, logs, parts
        shutil.rmtree(self._logs, ignore_errors=True)
        for folder in (out, self._logs, place.results):
            folder.mkdir(parents=True, exist_ok=True)
        self.ended: dict[str, dict[str, Any]] = {}
        """Command → how it ended, of which part."""
        self._kept = 0.0
        self._started = time.monotonic()

    def run(self, part: str, command: Command) -> None:
        """Run a command; its log is named after it."""
        print(f"== {part}: {command.name}, at most {command.seconds:.0f} s", flush=True)
        self.ended[command.name] = {"part": part, "status": "cut", "code": None, "seconds": None}
        ended: Ended = run(
            [sys.executable, *command.arguments],
            self._logs / f"{command.name}.log",
            seconds=command.seconds,
            environment=environment(self._place),
            directory=ROOT,
            idle=self._keep,
        )
        self.ended[command.name] = {"part": part} | asdict(ended)
        print(f"== {command.name}: {ended.status} (status {ended.code}) after {ended.seconds:.0f} s", flush=True)
        self._keep(at_once=True)

    def finish(self) -> None:
        """Write archive and summary, and print the summary."""
        self._keep(at_once=True)
        print((self._out / "summary.txt").read_text(encoding="utf-8"), end="", flush=True)

    def _keep(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if not at_once and now - self._kept < KEEP_SECONDS:
            return
        self._kept = now
        described = {
            "command": "python -m benchmarks.gpu " + " ".join(self.parts),
            "commit": hardware.commit(),
            "card": hardware.gpu(),
            "device": self._place.device,
            "tiny": self._place.tiny,
            "seconds": now - self._started,
            "commands": self.ended,
        }
        (self._logs / "run.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        lines = summary.lines(described, self._place.results)
        for folder in (self._out, self._logs):
            (folder / "summary.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        archive.write(self._out / "gpu.tar.gz", self._place.results, self._logs)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; by default all")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="a part; may be repeated")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="a trial with tiny shapes, whose figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="archive and summary (default: runs/gpu)")
    parser.add_argument("--results", type=Path, help="results (default: benchmarks/results/DEVICE)")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "gpu-logs", help="logs (default: build/gpu-logs)")
    options = parser.parse_args(arguments)
    chosen = [*options.parts, *options.only]
    for part in chosen:
        if part not in PARTS:
            parser.error(f"no part {part!r}: use any of {', '.join(PARTS)}")
    options.parts = [part for part in PARTS if part in chosen or not chosen]
    if options.device == "auto":
        options.device = "cuda"
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu: the models and shapes need a GPU; add --tiny for a trial on a CPU")
    if options.results is not None:
        options.results = options.results.resolve()
    return options


def _results(device: str, tiny: bool) -> Path:
    """Return the folder of a device's results; a trial has one of its own."""
    if tiny:
        return ROOT / "build" / "gpu-trial"
    card = hardware.gpu()
    return ROOT / "benchmarks" / "results" / hardware.slug(str(card["name"]) if card else device)


if __name__ == "__main__":
    sys.exit(main())
