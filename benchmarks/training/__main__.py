"""python -m benchmarks.training: a whole step of reinforcement learning, compared with a recipe using TRL's GRPO trainer.

A step samples K rewrites of each prompt and M responses of a frozen target to each, scores them and updates the
prompter. A chain is one response. Prints a table and writes JSON and a PNG.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.utils import logging as transformers_logging

from alignpro.errors import ConfigError
from benchmarks import command
from benchmarks.session import Session
from benchmarks.training import figure
from benchmarks.training.measure import PEERS, compare
from benchmarks.training.table import print_results
from benchmarks.training.task import make_task
from benchmarks.workload import PAPER, find_workload

app = command.new_app()


@app.command(help=__doc__)
def run(
    overrides: command.Overrides = None,
    workload: command.WorkloadName = PAPER.name,
    shape: command.Shape = None,
    peers: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(PEERS)} or none; may be repeated. Default: all.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Timed steps. Default: 7; with --quick 2.")] = None,
    warmup: command.Warmup = 2,
    device: command.Device = "cpu",
    threads: command.Threads = None,
    seed: command.Seed = 0,
    json_file: command.ResultsFile = None,
    quick: command.Quick = False,
) -> None:
    """See the module."""
    what = find_workload(workload, shape, quick=quick)
    if unknown := set(peers or ()) - {*PEERS, "none"}:
        raise typer.BadParameter(f"peer {unknown.pop()!r}: use {', '.join(PEERS)} or none")
    chosen = [name for name in PEERS if not peers or name in peers]
    name = f"training_{what.name}"
    session = Session("training", device=device, threads=threads, quick=quick, file=json_file, name=name)
    steps = steps or (2 if quick else 7)

    transformers_logging.disable_progress_bar()
    session.print(f"{what.name}: {what.describe()}")
    session.print_device()
    with tempfile.TemporaryDirectory(prefix="alignpro-benchmark-") as directory:
        task = make_task(what, Path(directory), steps=warmup + steps, seed=seed)
        try:
            entrants = compare(task, session.device, chosen, overrides or [], warmup)
        except ConfigError as error:
            raise typer.BadParameter(str(error)) from None
    peer_speed = entrants.get("trl", {}).get("chains_per_s")
    document: dict[str, Any] = entrants | {
        "ratio": entrants["ours"]["chains_per_s"] / peer_speed if peer_speed else None,
        "workload": asdict(what) | {"chains": what.chains},
        "run": session.describe(seed=seed, warmup=warmup, steps=steps, overrides=overrides or []),
    }
    session.save(document)
    print_results(session, entrants, document["ratio"])
    figure.draw(document, list(entrants), session.figure)
    session.finish()


if __name__ == "__main__":
    app()
