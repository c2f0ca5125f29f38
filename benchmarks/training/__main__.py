"""python -m benchmarks.training: a whole step of reinforcement learning, compared with a recipe using TRL's GRPO trainer.

A step samples K rewrites of each prompt and M responses of a frozen target to each, scores them and updates the
prompter. A chain is one response. Prints a table and writes JSON and a PNG.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers.utils import logging as transformers_logging

from alignpro.errors import ConfigError
from benchmarks import environment, options
from benchmarks.training import figure
from benchmarks.training.measure import PEERS, measure
from benchmarks.training.table import print_table
from benchmarks.training.task import make_task
from benchmarks.workload import BARE, PAPER, QUICK, find_workload, reshape

WIDTH = 120  # if the output is not a terminal

app = options.new_app()


@app.command(help=__doc__)
def run(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides of our configuration, as for `alignpro train`: objective.kl.estimator=k3"),
    ] = None,
    workload: Annotated[str, typer.Option(help=f"{PAPER.name} or {BARE.name}.")] = PAPER.name,
    shape: options.Shape = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(PEERS)} or none; may be repeated. Default: all.", show_default=False),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Timed steps. Default: 7; with --quick 2.", show_default=False)
    ] = None,
    warmup: Annotated[int, typer.Option(min=1, help="Warm-up steps before the timed ones.")] = 2,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Results file: benchmarks/results/DEVICE/training_WORKLOAD.json.", show_default=False
        ),
    ] = None,
    quick: options.Quick = False,
) -> None:
    """See the module."""
    options.use_threads(threads)
    where = options.find_device(device)
    try:
        what = reshape(QUICK if quick else find_workload(workload), shape or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    chosen = _peers(peers)
    timed = steps or (2 if quick else 7)
    file = json_file or options.results_folder("training", where, quick=quick) / f"training_{what.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)

    transformers_logging.disable_progress_bar()
    console = options.new_console(WIDTH)
    console.print(f"{what.name}: {what.describe()}", highlight=False)
    console.print(f"{environment.device_name(where)}, {torch.get_num_threads()} CPU threads", highlight=False)
    with tempfile.TemporaryDirectory(prefix="alignpro-benchmark-") as directory:
        task = make_task(what, Path(directory), steps=warmup + timed, seed=seed)
        try:
            entrants = measure(task, where, chosen, overrides or [])
        except ConfigError as error:
            raise typer.BadParameter(str(error)) from None

    described = environment.describe("benchmarks.training", where, torch.float32, environment.command_line())
    document: dict[str, Any] = {name: entrant.summary(what.chains, warmup) for name, entrant in entrants.items()}
    speeds = {name: summary.get("chains_per_s") for name, summary in document.items()}
    document |= {
        "ratio": speeds["ours"] / speeds["trl"] if speeds.get("trl") else None,
        "workload": asdict(what) | {"chains": what.chains},
        "run": described | {"seed": seed, "warmup": warmup, "steps": timed, "overrides": overrides or []},
    }
    file.write_text(json.dumps(document, indent=1) + "\n")
    print_table(console, document, list(entrants))
    picture = file.with_suffix(".png")
    figure.draw(document, list(entrants), picture)
    console.print(f"{file}\n{picture}", highlight=False)


def _peers(names: list[str] | None) -> list[str]:
    """Return the requested peers, all by default."""
    if not names:
        return list(PEERS)
    if names == ["none"]:
        return []
    if unknown := [name for name in names if name not in PEERS]:
        raise typer.BadParameter(f"peer {unknown[0]!r}: use {', '.join(PEERS)} or none")
    return names


if __name__ == "__main__":
    app()
