"""Ownership of a run directory: it holds one run with one configuration, and one process uses it at a time."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from alignpro.config import RunSection, dump_config
from alignpro.endpoints.known_servers import FILE_NAME as KNOWN_SERVERS
from alignpro.endpoints.ledger_schema import FILE_NAME
from alignpro.errors import CheckpointError, TrainingError
from alignpro.prompting.memory import FILE_NAME as MEMORY
from alignpro.training.checkpoint import recorded_run
from alignpro.training.durability import is_leftover, remove_directory, remove_leftovers, replace_text
from alignpro.training.resume import check_configuration

logger = logging.getLogger(__name__)

_LOCK = "run.lock"
RUN_ID = "run_id"
"""File with the identity of the run, which its checkpoints repeat."""
_EXPORT_STEP = "alignpro.json"
_RESULTS = ("metrics.jsonl", "samples.jsonl", MEMORY, "checkpoints", "model")
"""Entries that make a run worth keeping; a run without any of these failed before its first step."""
_OTHER_FILES = (_LOCK, RUN_ID, KNOWN_SERVERS, "config.yaml", "tensorboard", "wandb", "wandb_id")


def refuse_run(out: Path) -> None:
    """Raise if another command's output directory holds a training run.

    Raises:
        TrainingError: It does.
    """
    if (out / RUN_ID).exists():
        raise TrainingError(f"{out}: holds a training run, whose files would be overwritten; name another `out`")


def refuse_other_files(run: Path) -> None:
    """Raise if there is something else than a run where a training would write.

    Raises:
        TrainingError: ``run`` is a file, or a directory with files that do not belong to a run.
    """
    if run.exists() and not run.is_dir():
        raise TrainingError(f"run directory {run}: is a file; name another run.out")
    if run.is_dir() and not _has_results(run):
        found = sorted(
            each.name
            for each in run.iterdir()
            if each.name not in _OTHER_FILES and not each.name.startswith(FILE_NAME) and not is_leftover(each)
        )
        if found:
            raise TrainingError(
                f"run directory {run}: is not empty and holds no run (it has {', '.join(found[:5])}); name another run.out"
            )


def _has_results(run: Path) -> bool:
    return (run / "config.yaml").is_file() and any((run / name).exists() for name in _RESULTS)


class RunDirectory:
    """A run directory, locked for this process until `close`.

    Args:
        config: The job's whole configuration; its directory is created if it does not exist.
        resume: Whether the directory may hold a run, which must have the same configuration.

    Raises:
        TrainingError: The directory holds a run and ``resume`` was not requested, or files that do not belong to a run;
            another process is using it; its run has another configuration; or it cannot be written.
    """

    def __init__(self, config: RunSection, *, resume: bool) -> None:
        self.path = path = config.run.out
        self.model = path / "model"
        self._config = path / "config.yaml"
        refuse_other_files(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            if _has_results(path):
                if not resume:
                    raise TrainingError(
                        f"run directory {path}: holds a run already; continue it with --resume, or name another run.out"
                    )
                check_configuration(self._config, config)
            remove_leftovers(path)
            replace_text(self._config, dump_config(config))
            if not (path / RUN_ID).is_file():
                replace_text(path / RUN_ID, f"{recorded_run(path / 'checkpoints') or uuid4().hex}\n")
        except OSError as error:
            self.close()
            raise self._unwritable(error) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unlock the directory for other processes."""
        self._lock.close()

    def record(self, config: RunSection) -> None:
        """Write config.yaml anew, with what was chosen for the run after its directory had been opened.

        Raises:
            TrainingError: It cannot be written.
        """
        try:
            replace_text(self._config, dump_config(config))
        except OSError as error:
            raise self._unwritable(error) from error

    def exported_step(self) -> int | None:
        """Return the step of the model in ``model/``; None if there is none.

        Raises:
            CheckpointError: ``model/`` was not written by a run, or is damaged.
        """
        if not self.model.exists():
            return None
        try:
            return int(json.loads((self.model / _EXPORT_STEP).read_text())["step"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.model}: was not written by a run ({error}); move it away") from error

    def mark_export(self, model: Path, step: int, selected: Mapping[str, Any]) -> None:
        """Record where a model comes from in its directory, before the directory is renamed into place.

        Args:
            model: Its directory.
            step: The step that the run had reached.
            selected: The evaluations of the selected and of the last model, if one was selected; they are recorded.
        """
        record = {"step": step, **({"selected": selected} if selected else {})}
        (model / _EXPORT_STEP).write_text(json.dumps(record) + "\n")

    def remove_export_after(self, step: int) -> None:
        """Remove the model of a later step, which a run that continues from ``step`` will write again."""
        exported = self.exported_step()
        if exported is not None and exported > step:
            logger.warning("removing %s: the run continues from step %d", self.model, step)
            remove_directory(self.model)

    def _take_lock(self) -> IO[str]:
        file = (self.path / _LOCK).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise TrainingError(
                f"run directory {self.path}: another process{f' ({holder})' if holder else ''} is training in it; wait for "
                "it, or name another run.out"
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()}")
        file.flush()
        return file

    def _unwritable(self, error: OSError) -> TrainingError:
        return TrainingError(f"run directory {self.path}: cannot be written: {error}; name another run.out")
