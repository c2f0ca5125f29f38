"""python -m benchmarks.engine: the chain engine compared with transformers' `generate` and continuous batching.

Every entrant generates the same number of tokens. Prints a table per case and writes JSON and a PNG.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import environment, options
from benchmarks.engine import figure, ours, peers
from benchmarks.engine.cases import CASES, Case, reshaped, shrink
from benchmarks.engine.entrant import Setting
from benchmarks.engine.floor import measure_rates
from benchmarks.engine.measure import measure
from benchmarks.engine.table import print_table

WIDTH = 130  # if the output is not a terminal

app = options.new_app()


@app.command(help=__doc__)
def run(
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(case.name for case in CASES)}, or patterns; may be repeated. Default: all, on a CPU all "
            "but gpu.",
            show_default=False,
        ),
    ] = None,
    shape: options.Shape = None,
    entrants: options.Entrants = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Timed rounds. Default: 5; with --quick 1.", show_default=False)
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Maximum number of running sequences. Default: 256, on a GPU 1024.", show_default=False
        ),
    ] = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Results file: benchmarks/results/DEVICE/engine.json.", show_default=False),
    ] = None,
    quick: options.Quick = False,
) -> None:
    """See the module."""
    options.use_threads(threads)
    where = options.find_device(device)
    what = options.find_dtype(dtype, where)
    cases = _cases(workload, shape or [], where, quick)
    chosen = options.matching([ours.entrant(), *peers.entrants()], entrants, "entrant")
    setting = Setting(where, what, max_batch or (256 if where.type == "cpu" else 1024), seed)
    turns = rounds or (1 if quick else 5)
    file = json_file or options.results_folder("engine", where, quick=quick) / "engine.json"
    file.parent.mkdir(parents=True, exist_ok=True)

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # failures are in the results
    console = options.new_console(WIDTH)
    rates = measure_rates(where, what)
    described = environment.describe("benchmarks.engine", where, what, environment.command_line())
    run_as = described | {"seed": seed, "rounds": turns, "max_batch": setting.max_batch, "rates": asdict(rates)}
    document: dict[str, Any] = {"run": run_as, "results": []}
    console.print(
        f"{environment.device_name(where)}, {what}, {torch.get_num_threads()} CPU threads; "
        f"{rates.bytes_per_s / 1e9:.3g} GB/s, {rates.flops_per_s / 1e12:.3g} TFLOP/s",
        highlight=False,
    )
    for case in cases:
        with console.status(case.title):
            result = measure(case, chosen, setting, turns, rates)
            if not case.chain and any(entrant.name == ours.NAME for entrant in chosen):
                result["decode_ticks"] = ours.decode_ticks(case, setting)
            document["results"].append(result)
        file.write_text(json.dumps(document, indent=1) + "\n")  # after every case, so that an aborted run keeps results
        print_table(console, result)
    picture = file.with_suffix(".png")
    figure.draw(document, picture)
    console.print(f"{file}\n{picture}", highlight=False)


def _cases(names: list[str] | None, changes: Sequence[str], device: torch.device, quick: bool) -> list[Case]:
    cases = options.matching(CASES, names, "workload")
    if quick:
        cases = [shrink(case) for case in cases]
    elif device.type == "cpu":
        if names and any(case.needs_gpu and case.name in names for case in cases):
            raise typer.BadParameter("workload gpu: its models need a GPU; use --device cuda, or --quick to try it")
        cases = [case for case in cases if not case.needs_gpu]
    try:
        return [reshaped(case, changes) for case in cases]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


if __name__ == "__main__":
    app()
