"""The directory of an experiment: one process works in it, and its cells keep their configurations."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from alignpro.config import dump_config, load_config
from alignpro.config.endpoints import changes_no_answer
from alignpro.errors import TrainingError
from alignpro.experiments.cell_jobs import Job
from alignpro.experiments.cells import Cell
from alignpro.training.durability import replace_text
from alignpro.training.resume import differences
from alignpro.training.run_directory import refuse_run

_LOCK = "experiment.lock"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Create the directory of an experiment, and keep other processes from working in it.

    Raises:
        TrainingError: Another process does, it is that of a training run, or it cannot be written.
    """
    refuse_run(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / _LOCK).open("a+")
    except OSError as error:
        raise TrainingError(f"{out}: cannot be written: {error}; name another `out`") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip()
            raise TrainingError(
                f"{out}: another process ({holder}) works on this experiment; wait for it, or name another `out`"
            ) from None
        lock.truncate(0)
        lock.write(f"pid {os.getpid()}")
        lock.flush()
        yield


def record_configurations(plan: Sequence[Cell]) -> None:
    """Write the configuration of every job beside its results.

    Raises:
        TrainingError: A job that was begun had another configuration: its cell cannot be compared with the others.
    """
    jobs = [job for cell in plan for job in cell.jobs]
    changed = [each for job in jobs if _begun(job) and (each := _change(job))]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise TrainingError(
            f"{changed[0]}{more}: cells of one experiment are compared with each other; use the recorded values, name another "
            "`out`, or remove the directories of these cells to run them again"
        )
    for job in jobs:
        job.file.parent.mkdir(parents=True, exist_ok=True)
        text = dump_config(job.config)
        if not job.file.exists() or job.file.read_text() != text:
            replace_text(job.file, text)


def _begun(job: Job) -> bool:
    """Whether there are results, or a part of them, that depend on the job's configuration."""
    return job.file.exists() and (job.done or job.result.parent.exists())


def _change(job: Job) -> str | None:
    """How the configuration of a job differs from the recorded one; None if it does not.

    Prompters that were added later do not count (``also_fit``): whether the prompts are still the same is found in comparing. Nor
    does that on which no result depends, such as the budget.
    """
    recorded = load_config(type(job.config), [str(job.file)])
    before, now = recorded.model_dump(mode="json"), job.config.model_dump(mode="json")
    found = [
        f"{key} was {old!r}, is {new!r}"
        for key, old, new in differences(before, now)
        if key not in ("also_fit", "search.threads") and not changes_no_answer(key)
    ]
    return f"{job.file}: {', '.join(found)}" if found else None
