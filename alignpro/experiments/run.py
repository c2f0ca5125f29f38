"""`alignpro experiment`: run the cells of an experiment that are not done, one after another, and compare all that are."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext

import torch

from alignpro.config import ConfigSource, ExperimentConfig, dump_config, resolve_config
from alignpro.errors import Interrupted, TrainingError
from alignpro.experiments.cell_jobs import Job
from alignpro.experiments.cell_record import CellRecord, State, read_record
from alignpro.experiments.cells import Cell, cells
from alignpro.experiments.comparison import write_comparison
from alignpro.experiments.directory import locked, record_configurations
from alignpro.experiments.forking import ForkingRunner, Runner
from alignpro.experiments.process import THIS_PYTHON, last_error, run_command
from alignpro.experiments.time_left import describe_time_left
from alignpro.training.durability import replace_text
from alignpro.training.progress import show_duration
from alignpro.training.stop_signals import stop_signals
from alignpro.versions import versions

logger = logging.getLogger(__name__)


def run_experiment(config: ConfigSource[ExperimentConfig], run: Runner | None = None) -> None:
    """Run every cell that is not done, and write ``report.html`` and ``summary.json`` of all that are.

    A cell that is done is never run again; one that was interrupted goes on where it stopped; one that failed is tried again
    by the next call. A cell that fails does not keep the others from running.

    Args:
        config: The experiment: as an `ExperimentConfig`, a mapping, the path of a YAML file, or files and overrides.
        run: What runs the commands of the cells; by default each is a process of its own.

    Raises:
        TrainingError: Cells failed; the message names them. Or a cell was done with another configuration.
        ConfigError: The configuration of a cell is invalid; nothing has been run.
        Interrupted: SIGINT or SIGTERM asked the experiment to stop; all that is done is kept and compared.
    """
    config = resolve_config(ExperimentConfig, config)
    plan = cells(config)
    with locked(config.out), stop_signals() as received:
        record_configurations(plan)
        replace_text(config.out / "config.yaml", dump_config(config))
        with nullcontext(run) if run is not None else _command_runner() as runner:
            failed = _run_all(config, plan, runner, lambda: received[0] if received else None)
        write_comparison(config, plan)
        if received:
            raise Interrupted(received[0], config.out, "continue with the same command")
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(plan)} cells failed, and are tried again by the same command:\n"
            + "\n".join(f"  {name}: {error}" for name, error in failed.items())
        )


def _command_runner() -> AbstractContextManager[Runner]:
    """What runs the commands of cells: forks on a CPU under Linux, and new processes elsewhere.

    A process that has asked for a GPU cannot be forked into one that uses it, and loading is little of what runs there.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return nullcontext(run_command)
    return closing(ForkingRunner())


def _run_all(
    config: ExperimentConfig, plan: Sequence[Cell], run: Runner, stopped: Callable[[], int | None]
) -> dict[str, str]:
    """Run the cells that are not done; return name → error of those that failed."""
    failed: dict[str, str] = {}
    pending = [cell for cell in plan if not cell.done]
    logger.info("%d of %d cells are done", len(plan) - len(pending), len(plan))
    for i, cell in enumerate(pending):
        if stopped() is not None:
            break
        if cell.needs is not None and cell.needs.name in failed:
            failed[cell.name] = f"needs {cell.needs.name}, which failed"
            continue
        logger.info("%s  (%s)", cell.name, describe_time_left(plan, pending[i:]))
        record = _run(config, cell, run, stopped)
        if record.state == "failed":
            failed[cell.name] = record.error or "failed"
            logger.warning("%s: failed: %s", cell.name, record.error)
        elif record.state == "done":
            logger.info("%s  done after %s", cell.name, show_duration(record.seconds))
    return failed


def _run(config: ExperimentConfig, cell: Cell, run: Runner, stopped: Callable[[], int | None]) -> CellRecord:
    """Run the jobs of a cell that are not done."""
    log, started = cell.directory / "log.txt", time.monotonic()
    state: State = "done"
    error = None
    log.unlink(missing_ok=True)  # of an attempt before, whose error is not that of this one
    for job in cell.jobs:
        if job.done:
            continue
        status = run(_starter(config, job), arguments(job), log, stopped)
        if not job.done:
            state = "failed" if stopped() is None else "stopped"
            error = None if state == "stopped" else last_error(log) or f"exit status {status}; see {log}"
            break
    command = " && ".join(shlex.join(["alignpro", *arguments(job)]) for job in cell.jobs)
    record = CellRecord(state, time.monotonic() - started, command, error, versions())
    record = record.after(read_record(cell.directory))
    record.write(cell.directory)
    return record


def arguments(job: Job) -> list[str]:
    """The arguments of ``alignpro`` for a job."""
    path = os.fspath(job.file)
    return [job.command, path] if job.command in ("eval", "rival") else [job.command, path, "--resume"]


def _starter(config: ExperimentConfig, job: Job) -> Sequence[str]:
    """Trainings of policies may run on several devices; the rest is one process."""
    return config.launcher if config.launcher and job.command in ("train", "rlhf") else THIS_PYTHON


def describe_plan(config: ExperimentConfig) -> list[str]:
    """Lines that say which cells there are and which are done, without running any."""
    plan = cells(config)
    done = sum(cell.done for cell in plan)
    left = [cell for cell in plan if not cell.done]
    lines = [f"{len(plan)} cells, {done} done; {describe_time_left(plan, left)}" if left else f"{done} cells, all done"]
    return lines + [f"{'done' if cell.done else '    '}  {cell.name}" for cell in plan]


def compare_done(config: ConfigSource[ExperimentConfig]) -> None:
    """Compare the cells that are done, without running any.

    Raises:
        TrainingError: A cell was done with another configuration, or none is done.
    """
    config = resolve_config(ExperimentConfig, config)
    plan = cells(config)
    with locked(config.out):
        record_configurations(plan)
        if not any(cell.done and cell.evaluated for cell in plan):
            raise TrainingError(f"{config.out}: no cell is done yet: run the same command without --compare")
        write_comparison(config, plan)
