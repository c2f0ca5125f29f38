"""python -m benchmarks.engine: the chain engine compared with transformers' `generate` and continuous batching.

Every entrant generates the same number of tokens. Prints a table per case and writes JSON and a PNG. With --model, a real
model is measured in the place of random ones, and vLLM and llama.cpp take part where they are installed. With --simulate,
the engine's scheduler runs with models that compute nothing, and the time on a GPU is predicted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import command
from benchmarks.busy import BusyProcesses
from benchmarks.device import dtype_name, empty_cache
from benchmarks.engine import figure, llama_cpp, ours, peers, vllm
from benchmarks.engine.cases import CASES, Case, shrink
from benchmarks.engine.entrant import Setting
from benchmarks.engine.floor import floor_seconds, measure_rates
from benchmarks.engine.given import cases_of
from benchmarks.engine.measure import compare
from benchmarks.engine.simulation.cards import CARDS
from benchmarks.engine.simulation.run import python_loop_seconds
from benchmarks.engine.simulation.run import simulate as simulate_runs
from benchmarks.engine.table import print_case, print_simulation
from benchmarks.session import Session
from benchmarks.workload import find_workload, reshape

RUNS = 3
"""Simulated runs: the first one captures the graphs."""

app = command.new_app()


@app.command(help=__doc__)
def run(
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(case.name for case in CASES)}, or patterns; may be repeated. Default: all, on a CPU all "
            "but gpu. With --model: n1, n4, chains."
        ),
    ] = None,
    model: command.ModelDirectory = None,
    prompts: command.PromptsFile = None,
    shape: command.Shape = None,
    entrants: command.Entrants = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Timed rounds. Default: 5; with --quick 1.")] = None,
    device: command.Device = "auto",
    dtype: command.Dtype = "auto",
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of running sequences. Default: 256, on a GPU 1024.")
    ] = None,
    threads: command.Threads = None,
    seed: command.Seed = 0,
    json_file: command.ResultsFile = None,
    quick: command.Quick = False,
    busy: Annotated[
        int | None,
        typer.Option(min=1, help="Also measure beside this many busy processes, in the same run, on a CPU."),
    ] = None,
    simulate: Annotated[
        str | None,
        typer.Option(
            help=f"Instead: run the scheduler with stub models, and predict the times on one of {', '.join(CARDS)}."
        ),
    ] = None,
    async_scheduling: Annotated[
        bool, typer.Option("--async-scheduling", help="With --simulate: passes are launched a step ahead, as on a GPU.")
    ] = False,
) -> None:
    """See the module."""
    if simulate is not None:
        _simulate(simulate, shape or [], max_batch or 256, seed, json_file, quick, async_scheduling)
        return
    if prompts is not None and model is None:
        raise typer.BadParameter("--prompts are for a model with a tokenizer: give --model too")
    name = "engine" if model is None else f"engine_{model.absolute().name}"
    name += "" if busy is None else f"_busy{busy}"
    session = Session("engine", device=device, dtype=dtype, threads=threads, quick=quick, file=json_file, name=name)
    everything = [ours.entrant(), *peers.entrants()]
    if model is None:
        cases = _cases(workload, shape or [], session.device, quick)
    else:
        cases = _cases_of(model, prompts, workload, shape or [], quick)
        everything += [*vllm.entrants(), *llama_cpp.entrants()]
    chosen = command.matching(everything, entrants, "entrant")
    on_cpu = session.device.type == "cpu"
    setting = Setting(session.device, session.dtype, max_batch or (256 if on_cpu else 1024), seed)
    rounds = rounds or (1 if quick else 5)
    if busy is not None and not on_cpu:
        raise typer.BadParameter("--busy: is a measurement on a CPU: add --device cpu")

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # failures are in the results
    dtypes = {session.dtype} if model is None else {session.dtype, torch.float32, torch.bfloat16}
    rates_of = {each: measure_rates(session.device, each, quick=quick) for each in dtypes}
    rates = rates_of[session.dtype]
    empty_cache(session.device)
    described = session.describe(seed=seed, rounds=rounds, max_batch=setting.max_batch, rates=asdict(rates))
    described["rates_by_dtype"] = {dtype_name(each): asdict(measured) for each, measured in rates_of.items()}
    document: dict[str, Any] = {"run": described, "results": []}
    session.print_device(f"{rates.bytes_per_s / 1e9:.3g} GB/s, {rates.flops_per_s / 1e12:.3g} TFLOP/s")
    with nullcontext() if busy is None else BusyProcesses(busy) as beside:
        for case in cases:
            with session.console.status(case.title):
                result = compare(case, chosen, setting, rounds, rates, beside)
                floors = {dtype_name(each): floor_seconds(case, measured, each) for each, measured in rates_of.items()}
                result["floor_by_dtype"] = dict(sorted(floors.items()))
                if busy is None and not case.chain and any(entrant.name == ours.NAME for entrant in chosen):
                    result["decode_ticks"] = ours.decode_ticks(case, setting)
                document["results"].append(result)
            session.save(document)
            print_case(session.console, result)
    figure.draw(document, session.figure)
    session.finish()


def _cases(names: list[str] | None, changes: Sequence[str], device: torch.device, quick: bool) -> list[Case]:
    cases = command.matching(CASES, names, "workload")
    if quick:
        cases = [shrink(case) for case in cases]
    elif device.type == "cpu":
        if names and any(case.needs_gpu and case.name in names for case in cases):
            raise typer.BadParameter("workload gpu: its models need a GPU; use --device cuda, or --quick to try it")
        cases = [case for case in cases if not case.needs_gpu]
    return [replace(case, workload=reshape(case.workload, changes)) for case in cases]


def _cases_of(
    model: Path, prompts: Path | None, names: list[str] | None, changes: Sequence[str], quick: bool
) -> list[Case]:
    cases = command.matching(cases_of(model, prompts, quick=quick), names, "workload")
    cases = [replace(case, workload=reshape(case.workload, changes)) for case in cases]
    for case in cases:
        if case.given and case.workload.prompts > len(case.given):
            raise typer.BadParameter(f"prompts={case.workload.prompts}: {prompts} has {len(case.given)}")
        if {case.workload.prompter.path, case.workload.target.path} != {str(model)}:
            raise typer.BadParameter("shape: with --model, the models have the shape of its directory")
    return cases


def _simulate(
    card: str,
    changes: Sequence[str],
    max_batch: int,
    seed: int,
    json_file: Path | None,
    quick: bool,
    async_scheduling: bool,
) -> None:
    if card not in CARDS:
        raise typer.BadParameter(f"card {card!r}: use one of {', '.join(CARDS)}")
    name = f"simulation_{card}_async" if async_scheduling else f"simulation_{card}"
    session = Session("engine", device="cpu", threads=1, quick=quick, file=json_file, name=name)
    workload = find_workload("gpu", changes, quick=quick)
    count = 2 if quick else RUNS
    runs = simulate_runs(
        workload, CARDS[card], max_batch=max_batch, runs=count, seed=seed, async_scheduling=async_scheduling
    )
    described = session.describe(seed=seed, max_batch=max_batch, workload=asdict(workload), card=asdict(CARDS[card]))
    session.save({"run": described | {"python_loop_s": python_loop_seconds()}, "results": runs})
    session.print(f"{CARDS[card].name}, predicted; host time measured on one core here; {workload.describe()}")
    print_simulation(session.console, runs)
    session.finish()


if __name__ == "__main__":
    app()
