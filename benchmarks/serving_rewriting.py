"""python -m benchmarks.serving_rewriting: the time that rewriting adds to requests, and how rewrites are skipped under load.

Clients send prompts of the embedded world one after another; before each next one, they wait as long as a target takes to answer.
The prompter is the demo's, on the engine's thread of this process; HTTP is not part of it. All prompts are sent once before they
are measured, so that the engine has them in its cache and only the rewrites are new; those of "new prompts" are new altogether.
Arms take turns, so that the machine's other work strikes all alike. A task that only sleeps measures how late the event loop
wakes it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from alignpro.config import SFTConfig, dump_config
from alignpro.config.serving_rewriting import RewritingConfig
from alignpro.demo import world
from alignpro.demo.run import WEIGHTS
from alignpro.serving.contract import Asked, Outcome
from alignpro.serving.rewriting import Rewriting
from benchmarks import command
from benchmarks.session import Session
from benchmarks.table import print_table

NEW_PROMPTS = "rewriting, new prompts"

app = command.new_app()


@app.command(help=__doc__)
def run(
    clients: Annotated[int, typer.Option(min=1, help="Requests at the same time.")] = 20,
    requests: Annotated[int, typer.Option(min=20, help="Requests of each arm and round.")] = 400,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in each of which every arm is measured.")] = 3,
    latency: Annotated[float, typer.Option(min=0, help="Seconds that a target takes to answer.")] = 0.3,
    quick: command.Quick = False,
    json_file: command.ResultsFile = None,
) -> None:
    """See the module."""
    session = Session("serving_rewriting", device="cpu", threads=1, quick=quick, file=json_file)
    if quick:
        requests, rounds, latency = 20, 1, 0.01
    arms = asyncio.run(_measure(clients, requests, rounds, latency))
    settings = {"clients": clients, "requests": requests, "rounds": rounds, "latency_s": latency}
    session.save({"run": session.describe(**settings), "arms": arms})
    keys = ["arm", "requests", "rewritten", "median_ms", "p90_ms", "p99_ms", "cpu_ms", "wake_ms"]
    rows = [[row["arm"], *(format(row[key], ",.3g") for key in keys[1:])] for row in arms]
    print_table(session.console, keys, rows, title=f"{clients} clients, a target of {1000 * latency:g} ms")
    session.finish()


async def _measure(clients: int, requests: int, rounds: int, latency: float) -> list[dict[str, Any]]:
    """Measure each arm in each round; returns the figures over all rounds."""
    with tempfile.TemporaryDirectory() as folder:
        run = _demo_run(Path(folder))
        settings: dict[str, dict[str, Any]] = {
            "opt out": {},
            "rewriting": {"cached_rewrites": 0},
            NEW_PROMPTS: {"cached_rewrites": 0},
            "again, from the cache": {},
            "deadline of 20 ms": {"cached_rewrites": 0, "deadline_ms": 20.0},
        }
        proxies = {name: await Rewriting.open(RewritingConfig(**more), [run]) for name, more in settings.items()}
        records = world.prompt_records((rounds + 1) * requests, 0, heldout=True)
        texts, *new = ([each["prompt"] for each in records[i :: rounds + 1]] for i in range(rounds + 1))
        seen: dict[str, list[dict[str, Any]]] = {name: [] for name in proxies}
        try:
            for name, proxy in proxies.items():  # what is computed once, and for the cache everything
                await _clients(proxy, texts, clients, 0.0, opt_out=name == "opt out")
            for prompts in new:
                for name, proxy in proxies.items():
                    sent = prompts if name == NEW_PROMPTS else texts
                    seen[name].append(await _clients(proxy, sent, clients, latency, opt_out=name == "opt out"))
        finally:
            for proxy in proxies.values():
                await proxy.close()
    return [_summary(name, each) for name, each in seen.items()]


def _demo_run(folder: Path) -> Path:
    """A run directory with the demo's prompter as `alignpro sft` left it."""
    run = folder / "demo"
    run.mkdir()
    (run / "model").symlink_to(WEIGHTS / "prompter")
    policy = {"path": str(WEIGHTS / "prompter"), "device": "cpu"}
    sections = {"run": {"out": str(run)}, "data": {"source": "demo"}, "policy": policy, "task": "rewrite"}
    (run / "config.yaml").write_text(dump_config(SFTConfig.model_validate(sections)))
    return run


async def _clients(
    proxy: Rewriting, texts: list[str], clients: int, latency: float, *, opt_out: bool
) -> dict[str, Any]:
    """Let clients send all texts once; returns the seconds of each and what became of them."""
    waiting = iter(texts)
    outcomes: list[Outcome] = []

    async def client() -> None:
        for text in waiting:
            body = {"model": "m", "messages": [{"role": "user", "content": text}]}
            asked = Asked("chat", body, json.dumps(body).encode(), "id", opt_out=opt_out)
            outcomes.append(await proxy.rewriter.rewrite(asked))
            await asyncio.sleep(latency)

    late: list[float] = []
    watch = asyncio.create_task(_watch(late))
    cpu = time.process_time()
    await asyncio.gather(*(client() for _ in range(clients)))
    cpu = time.process_time() - cpu
    watch.cancel()
    return {
        "seconds": [each.seconds for each in outcomes],
        "skipped": [each.skipped for each in outcomes],
        "cpu": cpu,
        "late": late,
    }


async def _watch(late: list[float]) -> None:
    """Note how much later than asked the event loop wakes a task."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(0.01)
        late.append(time.perf_counter() - before - 0.01)


def _summary(name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of an arm."""
    seconds = np.array([value for each in rounds for value in each["seconds"]])
    skipped = [reason for each in rounds for reason in each["skipped"]]
    median, p90, p99 = (1000 * float(np.quantile(seconds, q)) for q in (0.5, 0.9, 0.99))
    reasons = {str(reason): skipped.count(reason) for reason in sorted(set(skipped), key=str) if reason is not None}
    return {
        "arm": name,
        "requests": len(skipped),
        "rewritten": skipped.count(None),
        "skipped": reasons,
        "median_ms": median,
        "p90_ms": p90,
        "p99_ms": p99,
        "cpu_ms": 1000 * sum(each["cpu"] for each in rounds) / len(skipped),
        "wake_ms": 1000 * float(np.median([value for each in rounds for value in each["late"]] or [0.0])),
        "median_ms_by_round": [1000 * float(np.median(each["seconds"])) for each in rounds],
    }


if __name__ == "__main__":
    sys.exit(app())
