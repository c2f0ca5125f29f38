"""python -m benchmarks.distributed: whole training steps with DeepSpeed, compared with one process and `alignpro plan`.

Time: on a CPU all set-ups take turns within one launch, and each rank has as many threads as the single process; on a GPU
they run one after another. Memory: the peak tensor memory of a rank, in the rollout and in the update; on a CPU it is
measured in separate launches, with DeepSpeed's buckets scaled to the size of the models.
Prints tables and writes JSON.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers.utils import logging as transformers_logging

from alignpro.distributed.deepspeed.zero_config import read_zero_config
from alignpro.errors import ConfigError
from alignpro.models.loading import DTYPES
from alignpro.planning.memory import ONE_PROCESS, estimate_memory
from benchmarks import command
from benchmarks.device import dtype_name, empty_cache
from benchmarks.distributed.buckets import write_scaled
from benchmarks.distributed.job import ALONE, Job
from benchmarks.distributed.launch import LaunchError, launch
from benchmarks.distributed.summary import peaks, ratios, times
from benchmarks.distributed.table import print_results
from benchmarks.models import num_parameters
from benchmarks.pool import Pool, fit, needed_bytes
from benchmarks.session import Session
from benchmarks.training.ours import configure
from benchmarks.training.task import Task, make_task
from benchmarks.workload import PAPER, find_workload

CPU_POOL_BYTES = 64 << 20
"""Size of the KV pool when memory is measured: given, so that the plan counts the actual pool and not an upper bound."""
GPU_SETTINGS = ("rollout.engine.max_batch=1024", "optimizer.micro_batch_size=32")

app = command.new_app()


@app.command(help=__doc__)
def run(
    overrides: command.Overrides = None,
    workload: command.WorkloadName = PAPER.name,
    shape: command.Shape = None,
    setup: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A value of deepspeed.config, or {ALONE} (one process); may be repeated. Default: {ALONE}, z2 and z3; "
            "on a GPU z3 and z3_offload."
        ),
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Number of ranks. Default: 2; on a GPU 1.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 5,
    warmup: command.Warmup = 2,
    device: command.Device = "cpu",
    dtype: command.Dtype = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads per process.")] = 1,
    time: Annotated[bool, typer.Option("--time/--no-time", help="Whether to measure time.")] = True,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Whether to measure memory.")] = True,
    seed: command.Seed = 0,
    json_file: command.ResultsFile = None,
    quick: command.Quick = False,
) -> None:
    """See the module."""
    session = Session("distributed", device=device, dtype=dtype, quick=quick, file=json_file)
    what = find_workload(workload, shape, quick=quick)
    device = session.device.type
    on_gpu = device != "cpu"
    setups = setup or (["z3", "z3_offload"] if on_gpu else [ALONE, "z2", "z3"])
    ranks = ranks or (1 if on_gpu else 2)
    name = dtype_name(session.dtype)
    settings = [f"policy.dtype={name}", f"target.dtype={name}", *(GPU_SETTINGS if on_gpu else ()), *(overrides or [])]
    # Lengths are exact here, so the plan uses them instead of the limits of a real job.
    planned = [f"prompting.max_prompt_tokens={what.prompter_input}"]
    steps, warmup = (1, 1) if quick else (steps, warmup)

    transformers_logging.disable_progress_bar()
    session.print(f"{what.name}: {what.describe()}; {ranks} ranks, {name}")
    document: dict[str, Any] = {"setups": {}, "memory": {}, "workload": asdict(what) | {"chains": what.chains}}
    with tempfile.TemporaryDirectory(prefix="alignpro-benchmark-") as directory:
        root = Path(directory)
        task = make_task(what, root, steps=warmup + steps, seed=seed, dtype=session.dtype, device=session.device)
        try:
            pool_bytes = CPU_POOL_BYTES
            if on_gpu:
                pool = _pool(task, session.device, [*planned, *settings], setups, ranks)
                session.print(f"KV pool: {pool}")
                document["pool"], pool_bytes = asdict(pool), pool.bytes
            planned.append(f"rollout.engine.pool_bytes={pool_bytes}")
            if time:
                given = [*planned, *settings] if on_gpu else settings
                for group in [[each] for each in setups] if on_gpu else [setups]:
                    job = Job(task, group, device, threads, given, on_gpu and memory, root / f"times_{group[0]}")
                    found = launch(job, ranks)
                    document["setups"] |= {each: times(found, each, warmup, what.chains) for each in group}
                    if job.memory:
                        document["memory"] |= {group[0]: _memory(job, found)}
            if memory and not (time and on_gpu):
                few = replace(task, steps=2)  # the optimizer state exists from the second step on
                parameters = num_parameters(what.prompter)
                for each in [each for each in setups if each != ALONE]:
                    scaled = each if on_gpu else str(write_scaled(each, parameters, root))
                    out = root / f"memory_{Path(each).stem}"
                    job = Job(few, [scaled], device, threads, [*planned, *settings], True, out)
                    document["memory"] |= {each: _memory(job, launch(job, ranks))}
        except ConfigError as error:
            raise typer.BadParameter(str(error)) from None
        except LaunchError as error:
            session.print(str(error))
            raise typer.Exit(1) from None
    document["ratios"] = ratios(document["setups"])
    document["run"] = session.describe(ranks=ranks, threads=threads, seed=seed, warmup=warmup, steps=steps)
    session.save(document)
    print_results(session, document)
    session.finish()


def _pool(task: Task, device: torch.device, settings: list[str], setups: Sequence[str], ranks: int) -> Pool:
    """Return the KV pool that fits beside everything else that the plan has at its higher peak, of the largest set-up."""
    config = configure(task, device, [*settings, "rollout.engine.pool_bytes=1"])
    planned = (ONE_PROCESS if setup == ALONE else setup for setup in setups)
    peak = max(estimate_memory(config, setup, ranks).peak for setup in planned)
    empty_cache(device)
    free, total = torch.accelerator.get_memory_info(device)
    itemsize = DTYPES[config.target_model.dtype].itemsize
    return fit(needed_bytes(task.workload, itemsize), free=free, total=total, resident=int(peak))


def _memory(job: Job, found: list[dict[str, Any]]) -> dict[str, Any]:
    (setup,) = job.setups
    config = configure(job.task, torch.device(job.device), job.overrides)
    return peaks(found, setup, estimate_memory(config, setup, len(found))) | {"zero": read_zero_config(setup)}


if __name__ == "__main__":
    app()
