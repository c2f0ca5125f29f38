"""python -m benchmarks.training: a whole step of reinforcement learning, compared with a recipe using TRL's GRPO trainer.

A step samples K rewrites of each prompt and M responses of a frozen target to each, scores them and updates the
prompter. A chain is one response. Prints a table and writes JSON and a PNG. With --model, a real model is trained to rewrite
prompts for itself, and its sequences end where it ends them. Without peers (--peers none), the peak memory is measured too.
"""

from __future__ import annotations

import resource
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.utils import logging as transformers_logging

from alignpro.errors import ConfigError, ModelError
from benchmarks import command
from benchmarks.given_model import read_texts
from benchmarks.session import Session
from benchmarks.training import figure
from benchmarks.training.floor import floor_by_dtype
from benchmarks.training.given import workload_of
from benchmarks.training.measure import PEERS, compare
from benchmarks.training.table import print_results
from benchmarks.training.task import make_task, make_task_of
from benchmarks.workload import PAPER, find_workload

app = command.new_app()


@app.command(help=__doc__)
def run(
    overrides: command.Overrides = None,
    workload: command.WorkloadName = PAPER.name,
    shape: command.Shape = None,
    model: command.ModelDirectory = None,
    prompts: command.PromptsFile = None,
    lora: Annotated[
        int | None, typer.Option(min=1, help="With --model: train a LoRA of this rank instead of all weights.")
    ] = None,
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
    if model is None and (prompts is not None or lora is not None):
        raise typer.BadParameter("--prompts and --lora are for a real model: give --model too")
    if model is not None and workload != PAPER.name:
        raise typer.BadParameter(
            f"workload {workload!r}: has models of its own; with --model, change lengths with --shape"
        )
    what = (
        find_workload(workload, shape, quick=quick) if model is None else workload_of(model, shape or [], quick=quick)
    )
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
        if model is None:
            task = make_task(what, Path(directory), steps=warmup + steps, seed=seed)
        else:
            texts = [] if prompts is None else read_texts(prompts)
            task = make_task_of(model, what, Path(directory), texts, steps=warmup + steps, seed=seed, lora=lora)
        try:
            entrants = compare(task, session.device, chosen, overrides or [], warmup)
        except (ConfigError, ModelError) as error:
            raise typer.BadParameter(str(error)) from None
        # Of both entrants together it would say nothing.
        peak = (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if not chosen and session.device.type == "cpu"
            else None
        )
    peer_speed = entrants.get("trl", {}).get("chains_per_s")
    document: dict[str, Any] = entrants | {
        "ratio": entrants["ours"]["chains_per_s"] / peer_speed if peer_speed else None,
        "peak_bytes": peak,
        "workload": asdict(what) | {"chains": what.chains},
        "run": session.describe(seed=seed, warmup=warmup, steps=steps, overrides=overrides or []),
    }
    if model is not None:
        document["floor_by_dtype"] = floor_by_dtype(what, session.device, lora=lora is not None, quick=quick)
    session.save(document)
    print_results(session, entrants, document["ratio"], document.get("floor_by_dtype", {}))
    if peak is not None:
        session.print(f"peak memory of the process, with both models and all libraries: {peak / 1e9:.2f} GB")
    figure.draw(document, list(entrants), session.figure)
    session.finish()


if __name__ == "__main__":
    app()
