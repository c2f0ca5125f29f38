"""Ownership of a run directory: it holds one run with one configuration, and one process uses it at a time."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from pathlib import Path
from typing import IO, Any

from alignpro.config import Section, dump_config, load_config
from alignpro.errors import CheckpointError, ConfigError, TrainingError
from alignpro.training.durability import clean, discard, is_leftover, replace_text

logger = logging.getLogger(__name__)

_LOCK = "run.lock"
_EXPORT_MARK = "alignpro.json"
_WORK = ("metrics.jsonl", "samples.jsonl", "checkpoints", "model")
"""Entries that make a run worth keeping; a run without any of these failed before its first step."""
_SCAFFOLD = (_LOCK, "config.yaml", "tensorboard", "wandb", "wandb_id")


class RunDirectory:
    """A run directory, locked for this process until `close`.

    Args:
        config: The job's whole configuration.
        path: The directory; created if it does not exist.
        resume: Whether the directory may hold a run, which must have the same configuration.

    Raises:
        TrainingError: The directory holds a run and ``resume`` was not requested, or files that do not belong to a run;
            another process is using it; its run has another configuration; or it cannot be written.
    """

    def __init__(self, config: Section, path: Path, *, resume: bool) -> None:
        self.path = path
        self.model = path / "model"
        self._config = path / "config.yaml"
        self._refuse_foreign()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            if self._has_work():
                if not resume:
                    raise TrainingError(
                        f"run directory {path}: holds a run already; continue it with --resume, or name another run.out"
                    )
                self._check_same(config)
            elif resume:
                logger.info("run directory %s: holds no run to resume; starting one", path)
            clean(path)
            replace_text(self._config, dump_config(config))
        except OSError as error:
            self.close()
            raise self._unwritable(error) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unlock the directory for other processes."""
        self._lock.close()

    def exported_step(self) -> int | None:
        """Return the step of the model in ``model/``; None if there is none.

        Raises:
            CheckpointError: ``model/`` was not written by a run, or is damaged.
        """
        if not self.model.exists():
            return None
        try:
            return int(json.loads((self.model / _EXPORT_MARK).read_text())["step"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.model}: was not written by a run ({error}); move it away") from error

    def mark_export(self, model: Path, step: int) -> None:
        """Record the step of a model in its directory, before the directory is renamed into place."""
        (model / _EXPORT_MARK).write_text(json.dumps({"step": step}) + "\n")

    def discard_export_after(self, step: int) -> None:
        """Remove the model of a later step, which a run that continues from ``step`` will write again."""
        exported = self.exported_step()
        if exported is not None and exported > step:
            logger.warning("removing %s: the run continues from step %d", self.model, step)
            discard(self.model)

    def _has_work(self) -> bool:
        return self._config.is_file() and any((self.path / name).exists() for name in _WORK)

    def _refuse_foreign(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise TrainingError(f"run directory {self.path}: is a file; name another run.out")
        if self.path.is_dir() and not self._has_work():
            found = sorted(
                each.name for each in self.path.iterdir() if each.name not in _SCAFFOLD and not is_leftover(each)
            )
            if found:
                raise TrainingError(
                    f"run directory {self.path}: is not empty and holds no run (it has {', '.join(found[:5])}); "
                    "name another run.out"
                )

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

    def _check_same(self, config: Section) -> None:
        """Check that a resumed run keeps its configuration; in the section ``run``, only the seed must be the same."""
        try:
            before = load_config(type(config), [str(self._config)]).model_dump(mode="json")
        except ConfigError as error:
            raise TrainingError(
                f"run directory {self.path}: the run in it is not one of this command: {error}; name another run.out"
            ) from error
        changed = [
            f"{key} (was {old!r}, is {new!r})"
            for key, old, new in _differences(before, config.model_dump(mode="json"))
            if not key.startswith("run.") or key == "run.seed"
        ]
        if changed:
            raise TrainingError(
                f"run directory {self.path}: the configuration differs from that of the run to resume: "
                f"{', '.join(changed)}; use the values in {self._config}, or name another run.out"
            )

    def _unwritable(self, error: OSError) -> TrainingError:
        return TrainingError(f"run directory {self.path}: cannot be written: {error}; name another run.out")


def _differences(before: Any, after: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """List (dotted key, before, after) of the leaves in which two nested mappings differ, in key order."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            difference
            for key in sorted(before.keys() | after.keys())
            for difference in _differences(before.get(key), after.get(key), f"{prefix}{key}.")
        ]
    return [(prefix.rstrip("."), before, after)] if before != after else []
