"""python -m benchmarks.engine: generation by the chain engine, beside transformers' `generate` and continuous batching.

Every entrant generates the same number of tokens. Prints a table a case, writes JSON and a PNG beside it.
"""

from __future__ import annotations

import fnmatch
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import environment
from benchmarks.engine import figure, ours, peers
from benchmarks.engine.cases import CASES, Case, reshaped, shrink
from benchmarks.engine.entrant import Setting
from benchmarks.engine.floor import measure_rates
from benchmarks.engine.measure import measure
from benchmarks.engine.table import print_table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESULTS = Path(__file__).parents[1] / "results"
QUICK_OUT = Path("runs/engine-quick")
WIDTH = 130  # where the output is no terminal

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=__doc__)
def run(
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(case.name for case in CASES)}, or patterns; may be repeated. All, on a CPU all but gpu.",
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="Change the workloads: prompts=16, K=4, M=2, meta_prompt=…, prompt=…, rewrite=…, template=…, "
            "response=… in tokens, prompter=LAYERSxHIDDEN, target=…; may be repeated.",
            show_default=False,
        ),
    ] = None,
    entrants: Annotated[
        list[str] | None,
        typer.Option(help="Names or patterns, such as 'hf-*'; may be repeated. All.", show_default=False),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="5; with --quick 1.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; cuda where there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; bfloat16 on a GPU, else float32.")] = "auto",
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences at once: 256, on a GPU 1024.", show_default=False)
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch, on the CPU.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of weights and prompts.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="benchmarks/results/DEVICE/engine.json.", show_default=False)
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny models and few tokens, to see that all works; no valid figures.")
    ] = False,
) -> None:
    """See the module."""
    if threads is not None:
        torch.set_num_threads(threads)
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    default = "float32" if where.type == "cpu" else "bfloat16"
    what = DTYPES.get(default if dtype == "auto" else dtype)
    if what is None:
        raise typer.BadParameter(f"dtype {dtype!r}: take one of {', '.join(DTYPES)}")
    cases = _cases(workload, shape or [], where, quick)
    chosen = _matching([ours.entrant(), *peers.entrants()], entrants, "entrant")
    setting = Setting(where, what, max_batch or (256 if where.type == "cpu" else 1024), seed)
    turns = rounds or (1 if quick else 5)
    file = json_file or (QUICK_OUT if quick else RESULTS / environment.slug(where)) / "engine.json"
    file.parent.mkdir(parents=True, exist_ok=True)

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # what fails is in the results
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
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
        file.write_text(json.dumps(document, indent=1) + "\n")  # a run that is stopped leaves what it has
        print_table(console, result)
    picture = file.with_suffix(".png")
    figure.draw(document, picture)
    console.print(f"{file}\n{picture}", highlight=False)


def _cases(names: list[str] | None, changes: Sequence[str], device: torch.device, quick: bool) -> list[Case]:
    cases = _matching(CASES, names, "workload")
    if quick:
        cases = [shrink(case) for case in cases]
    elif device.type == "cpu":
        if names and any(case.needs_gpu and case.name in names for case in cases):
            raise typer.BadParameter("workload gpu: its models are for a GPU; take --device cuda, or --quick to try it")
        cases = [case for case in cases if not case.needs_gpu]
    try:
        return [reshaped(case, changes) for case in cases]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _matching(everything: Sequence[Any], patterns: list[str] | None, kind: str) -> list[Any]:
    """Those whose name matches a pattern, in their own order; a pattern that matches nothing is an error."""
    names = [one.name for one in everything]
    for pattern in patterns or []:
        if not fnmatch.filter(names, pattern):
            raise typer.BadParameter(f"{kind} {pattern!r}: take names or patterns of {', '.join(names)}")
    return [
        one for one in everything if not patterns or any(fnmatch.fnmatchcase(one.name, pattern) for pattern in patterns)
    ]


if __name__ == "__main__":
    app()
