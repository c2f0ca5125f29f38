"""python -m benchmarks.distributed: whole training steps with DeepSpeed, compared with one process and `alignpro plan`.

Time: on a CPU all set-ups take turns within one launch, and each rank has as many threads as the single process; on a GPU
they run one after another. Memory: the peak tensor memory of a rank, in the rollout and in the update; on a CPU it is
measured in separate launches, with DeepSpeed's buckets scaled to the size of the models.
Prints tables and writes JSON.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers.utils import logging as transformers_logging

from alignpro.distributed.deepspeed.zero_config import read_zero_config
from alignpro.errors import ConfigError
from alignpro.planning.memory import estimate_memory
from benchmarks import environment, options
from benchmarks.distributed.buckets import write_scaled
from benchmarks.distributed.job import ALONE, Job
from benchmarks.distributed.launch import LaunchError, launch
from benchmarks.distributed.summary import peaks, ratios, times
from benchmarks.distributed.table import print_table
from benchmarks.engine.cases import GPU_WORKLOAD
from benchmarks.models import num_parameters
from benchmarks.training.ours import configure
from benchmarks.training.task import make_task
from benchmarks.workload import PAPER, QUICK, WORKLOADS, Workload, find_workload, reshape

WIDTH = 120  # if the output is not a terminal
POOL_BYTES = {"cpu": 64 << 20, "cuda": 40 << 30}
"""Size of the KV pool when memory is measured: fixed, so that the plan counts the actual pool and not an upper bound."""
GPU_SETTINGS = ("rollout.engine.max_batch=1024", "optimizer.micro_batch_size=32")

app = options.new_app()


@app.command(help=__doc__)
def run(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Configuration overrides, as for `alignpro train`.")
    ] = None,
    workload: Annotated[str, typer.Option(help=f"{', '.join(WORKLOADS)} or {GPU_WORKLOAD.name}.")] = PAPER.name,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Change the workload, as for benchmarks.training; may be repeated.", show_default=False),
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A value of deepspeed.config, or {ALONE} (one process); may be repeated. Default: {ALONE}, z2 and z3; "
            "on a GPU z3 and z3_offload.",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Number of ranks. Default: 2; on a GPU 1.", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 5,
    warmup: Annotated[int, typer.Option(min=1, help="Warm-up steps before the timed ones.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: options.Dtype = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads per process.")] = 1,
    time: Annotated[bool, typer.Option("--time/--no-time", help="Whether to measure time.")] = True,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Whether to measure memory.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of weights, prompts and samples.")] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Results file: benchmarks/results/DEVICE/distributed.json.", show_default=False),
    ] = None,
    quick: options.Quick = False,
) -> None:
    """See the module."""
    if device not in POOL_BYTES:
        raise typer.BadParameter(f"device {device!r}: use {' or '.join(POOL_BYTES)}")
    on_gpu = device != "cpu"
    where = options.find_device(device)
    floats = options.find_dtype(dtype, where)
    what = _workload(workload, shape or [], quick)
    setups = setup or (["z3", "z3_offload"] if on_gpu else [ALONE, "z2", "z3"])
    count = ranks or (1 if on_gpu else 2)
    name = str(floats).removeprefix("torch.")
    settings = [f"policy.dtype={name}", f"target.dtype={name}", *(GPU_SETTINGS if on_gpu else ()), *(overrides or [])]
    # Lengths are exact here, so the plan uses them instead of the limits of a real job.
    planned = [f"prompting.max_prompt_tokens={what.prompter_input}", f"rollout.engine.pool_bytes={POOL_BYTES[device]}"]
    steps, warmup = (1, 1) if quick else (steps, warmup)

    transformers_logging.disable_progress_bar()
    console = options.new_console(WIDTH)
    console.print(f"{what.name}: {what.describe()}; {count} ranks, {name}", highlight=False)
    document: dict[str, Any] = {"setups": {}, "memory": {}, "workload": asdict(what) | {"chains": what.chains}}
    with tempfile.TemporaryDirectory(prefix="alignpro-benchmark-") as directory:
        root = Path(directory)
        task = make_task(what, root, steps=warmup + steps, seed=seed, dtype=floats, device=where)
        try:
            if time:
                given = [*planned, *settings] if on_gpu else settings
                for group in [[each] for each in setups] if on_gpu else [setups]:
                    job = Job(task, group, device, threads, given, on_gpu and memory, root / f"times_{group[0]}")
                    found = launch(job, count)
                    document["setups"] |= {each: times(found, each, warmup, what.chains) for each in group}
                    if job.memory:
                        document["memory"] |= {group[0]: _memory(job, found, count)}
            if memory and not (time and on_gpu):
                few = replace(task, steps=2)  # the optimizer state exists from the second step on
                parameters = num_parameters(what.prompter)
                for each in [each for each in setups if each != ALONE]:
                    scaled = each if on_gpu else str(write_scaled(each, parameters, root))
                    out = root / f"memory_{Path(each).stem}"
                    job = Job(few, [scaled], device, threads, [*planned, *settings], True, out)
                    document["memory"] |= {each: _memory(job, launch(job, count), count)}
        except ConfigError as error:
            raise typer.BadParameter(str(error)) from None
        except LaunchError as error:
            console.print(str(error), highlight=False, markup=False)
            raise typer.Exit(1) from None
    described = environment.describe("benchmarks.distributed", where, floats, environment.command_line())
    document["ratios"] = ratios(document["setups"])
    document["run"] = described | {"ranks": count, "threads": threads, "seed": seed, "warmup": warmup, "steps": steps}
    file = json_file or options.results_folder("distributed", where, quick=quick) / "distributed.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n")
    print_table(console, document)
    console.print(str(file), highlight=False)


def _memory(job: Job, found: list[dict[str, Any]], ranks: int) -> dict[str, Any]:
    (setup,) = job.setups
    config = configure(job.task, torch.device(job.device), job.overrides)
    return peaks(found, setup, estimate_memory(config, setup, ranks)) | {"zero": read_zero_config(setup)}


def _workload(name: str, changes: list[str], quick: bool) -> Workload:
    try:
        chosen = GPU_WORKLOAD if name == GPU_WORKLOAD.name else find_workload(name)
        return reshape(QUICK if quick else chosen, changes)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


if __name__ == "__main__":
    app()
