"""python -m benchmarks.serving_rewriting: the time that rewriting adds to chats, and how rewrites are skipped under load.

Clients, proxy and target are processes of their own on this machine. Clients send prompts of the embedded world; the prompter is
the demo's. All prompts are sent once before they are measured, so that the engine has them in its cache and only the rewrites are
new; those of "new prompts" are new altogether. Arms take turns, so that the machine's other work strikes all alike. What an arm
adds is its quantile less the median of direct chats.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from alignpro.config import SFTConfig, dump_config
from alignpro.demo import world
from alignpro.demo.run import WEIGHTS
from benchmarks import command
from benchmarks.serving.processes import CPUSeconds, chat, load, proxy, target
from benchmarks.session import Session
from benchmarks.table import print_table

KNOWN = 300
"""Prompts that are sent again and again."""
PATIENT: dict[str, Any] = {"rewriting.deadline_ms": 60_000}
"""Every rewrite is waited for, however busy the machine."""
NO_CACHE: dict[str, Any] = {"rewriting.cached_rewrites": 0}
SPENDERS = ("client", "target", "http", "engine")
"""Of CPU time; the last two are threads of the proxy."""
SHARES = {"median_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99}

app = command.new_app()


@app.command(help=__doc__)
def run(
    clients: Annotated[int, typer.Option(min=1, help="Chats at the same time.")] = 20,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each arm in each round.")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in each of which every arm is measured.")] = 3,
    latency: Annotated[float, typer.Option(min=0.001, help="Seconds after which the target answers.")] = 0.3,
    quick: command.Quick = False,
    json_file: command.ResultsFile = None,
) -> None:
    """See the module."""
    session = Session("serving_rewriting", device="cpu", threads=1, quick=quick, file=json_file)
    if quick:
        clients, seconds, rounds, latency = 4, 0.5, 1, 0.02
    settings = {"clients": clients, "seconds": seconds, "rounds": rounds, "latency_s": latency}
    description = session.describe(**settings)
    arms = _measure(clients, seconds, rounds, latency)
    session.save({"run": description, "arms": arms})
    keys = ["arm", "chats", "rewritten", "added_ms", "added_p99_ms", "rewriting_ms"]
    rows = []
    for row in arms:
        figures = [row["added"]["median_ms"], row["added"]["p99_ms"], row["rewriting_median_ms"]]
        figures += [row["cpu_ms_per_chat"][one] for one in SPENDERS]
        rows.append([row["arm"], str(row["chats"]), str(row["rewritten"]), *(format(each, ",.3g") for each in figures)])
    heads = keys + [f"{one} CPU ms" for one in SPENDERS]
    print_table(session.console, heads, rows, title=f"{clients} clients, a target of {1000 * latency:g} ms")
    session.finish()


@dataclass
class _Arm:
    """One way to send chats, and what was measured of it.

    Args:
        name: Of the arm.
        url: Where chats go.
        process: The proxy that they pass through, if any.
        texts: The prompts of each round.
        fields: Of the requests.
    """

    name: str
    url: str
    process: psutil.Process | None
    texts: list[list[str]]
    fields: dict[str, Any] = field(default_factory=dict)
    milliseconds: list[list[float]] = field(default_factory=list)
    rewriting_ms: list[float] = field(default_factory=list)
    rewrites: Counter[str] = field(default_factory=Counter)
    cpu: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SPENDERS, 0.0))

    def measure(self, index: int, clients: int, seconds: float, latency: float, target: psutil.Process) -> None:
        """Send chats for a round."""
        processes = [target] + ([] if self.process is None else [self.process])
        before = [CPUSeconds.of(each) for each in processes]
        done = load(self.url, self.bodies(index), clients, seconds, latency)
        spent = [CPUSeconds.of(each) - first for each, first in zip(processes, before, strict=True)]
        self.milliseconds.append(done["milliseconds"])
        self.rewriting_ms += done["rewriting_ms"]
        self.rewrites.update(done["rewrites"])
        self._spend("client", done["cpu_seconds"])
        self._spend("target", spent[0].total)
        for each in spent[1:]:
            self._spend("http", each.first_thread)
            self._spend("engine", each.other_threads)

    def _spend(self, who: str, seconds: float) -> None:
        self.cpu[who] += seconds

    def bodies(self, index: int) -> list[dict[str, Any]]:
        """The chats of a round."""
        return [chat(text, **self.fields) for text in self.texts[index]]

    def summary(self, direct_median: float) -> dict[str, Any]:
        """Its figures over all rounds."""
        whole = [value for each in self.milliseconds for value in each]
        quantiles = {name: float(np.quantile(whole, share)) for name, share in SHARES.items()}
        reasons = {key.removeprefix("skipped:"): count for key, count in sorted(self.rewrites.items())}
        return {
            "arm": self.name,
            "chats": len(whole),
            "rewritten": reasons.pop("applied", 0),
            "skipped": reasons,
            **quantiles,
            "added": {name: value - direct_median for name, value in quantiles.items()},
            "added_median_ms_by_round": [float(np.median(each)) - direct_median for each in self.milliseconds],
            "rewriting_median_ms": float(np.median(self.rewriting_ms or [0.0])),
            "cpu_ms_per_chat": {name: 1000 * spent / len(whole) for name, spent in self.cpu.items()},
        }


def _measure(clients: int, seconds: float, rounds: int, latency: float) -> list[dict[str, Any]]:
    """Measure each arm in each round; returns the figures over all rounds."""
    at_most = int(clients * (seconds / latency + 1))
    records = world.prompt_records(KNOWN + rounds * at_most, 0, heldout=True)
    known, *new = _parts([record["prompt"] for record in records], [KNOWN] + rounds * [at_most])
    again = rounds * [known]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        demo = _demo_run(Path(folder))
        url, answering = stack.enter_context(target(latency))
        cached = stack.enter_context(proxy(url, [demo], PATIENT))
        rewriting = stack.enter_context(proxy(url, [demo], PATIENT | NO_CACHE))
        late = stack.enter_context(proxy(url, [demo], NO_CACHE | {"rewriting.deadline_ms": 20}))
        arms = [
            _Arm("direct", url, None, again),
            _Arm("opt out", *cached, again, {"alignpro": {"opt_out": True}}),
            _Arm("rewriting", *rewriting, again),
            _Arm("rewriting, new prompts", *rewriting, new),
            _Arm("again, from the cache", *cached, again),
            _Arm("deadline of 20 ms", *late, again),
        ]
        for proxy_url, _ in (cached, rewriting, late):
            load(proxy_url, [chat(text) for text in known], clients, KNOWN / clients * 1.5 * latency + 1, latency)
        for index in range(rounds):
            for arm in arms:
                arm.measure(index, clients, seconds, latency, answering)
    direct = float(np.median([value for each in arms[0].milliseconds for value in each]))
    return [arm.summary(direct) for arm in arms]


def _parts(texts: list[str], sizes: list[int]) -> list[list[str]]:
    """The texts in parts of these sizes."""
    rest = iter(texts)
    return [[next(rest) for _ in range(size)] for size in sizes]


def _demo_run(folder: Path) -> Path:
    """A run directory with the demo's prompter as `alignpro sft` left it."""
    run = folder / "demo"
    run.mkdir()
    (run / "model").symlink_to(WEIGHTS / "prompter")
    policy = {"path": str(WEIGHTS / "prompter"), "device": "cpu"}
    sections = {"run": {"out": str(run)}, "data": {"source": "demo"}, "policy": policy, "task": "rewrite"}
    (run / "config.yaml").write_text(dump_config(SFTConfig.model_validate(sections)))
    return run


if __name__ == "__main__":
    sys.exit(app())
