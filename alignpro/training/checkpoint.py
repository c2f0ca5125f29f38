"""Checkpoints that survive a kill at any moment and are verified before they are loaded.

A checkpoint is written under a temporary name, synced to disk and renamed; its manifest holds its step, its run, a checksum
of every file, and a checksum of all this. A checkpoint that is damaged, renamed or of another run is skipped with a warning,
and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from alignpro.errors import CheckpointError
from alignpro.training.durability import disk_errors, remove_directory, remove_leftovers, replace_directory

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class CheckpointStore:
    """The checkpoints of a run.

    Args:
        directory: The directory that contains them, as ``step_000050`` and so on.
        keep: Number of newest checkpoints to keep.
        run_id: A file with the identity of the run, if it has one.
    """

    def __init__(self, directory: Path, keep: int, run_id: Path | None = None) -> None:
        self.directory = directory
        self.keep = keep
        self._run_id = run_id

    def save(self, step: int, write: Callable[[Path], None], best: int | None = None) -> Path:
        """Write a checkpoint: ``write`` puts its files into the directory that it is given.

        Args:
            step: Its step.
            write: Writes its files.
            best: The step of a checkpoint that is kept beside the newest.

        Raises:
            CheckpointError: It cannot be written (disk full, read-only, …). Earlier checkpoints are intact.
        """

        def write_checked(directory: Path) -> None:
            write(directory)
            write_manifest(directory, step, self._run())

        final = self.path(step)
        with self.write_errors(step):
            replace_directory(final, write_checked)
            for old in self.available()[: -self.keep]:
                if old != best:
                    remove_directory(self.path(old))
        return final

    def write_errors(self, step: int) -> AbstractContextManager[None]:
        """Context in which a failure to write the checkpoint of a step is a `CheckpointError` that names it."""
        remedy = "earlier checkpoints are intact: make room, then continue with --resume"
        return disk_errors(f"checkpoint {self.path(step)}", remedy)

    def available(self) -> list[int]:
        """List the steps that have a checkpoint, damaged ones included, oldest first."""
        found = (re.fullmatch(r"step_(\d+)", path.name) for path in self.directory.glob("step_*"))
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Return the directory of a step's checkpoint."""
        return self.directory / f"step_{step:06d}"

    def latest(self) -> int | None:
        """Return the newest step with an intact checkpoint; None if there are no checkpoints.

        Raises:
            CheckpointError: There are checkpoints, and every one is damaged.
        """
        steps = self.available()
        for step in reversed(steps):
            problem = self.damage(step)
            if problem is None:
                return step
            logger.warning("checkpoint %s is damaged (%s): trying the one before", self.path(step), problem)
        if steps:
            raise CheckpointError(f"{self.directory}: every checkpoint is damaged; start again in another run.out")
        return None

    def damage(self, step: int) -> str | None:
        """Describe what is wrong with the checkpoint of a step; None if it is intact."""
        if step not in self.available():
            return "there is none"
        return find_damage(self.path(step), step, self._run())

    def require(self, step: int, remedy: str = "omit --at, or name another step") -> None:
        """Check that a step has an intact checkpoint.

        Args:
            step: The step.
            remedy: What to do if it is damaged.

        Raises:
            CheckpointError: The checkpoint is missing or damaged.
        """
        if step not in self.available():
            have = ", ".join(map(str, self.available())) or "none"
            raise CheckpointError(f"{self.path(step)}: no such checkpoint; there are: {have}")
        problem = self.damage(step)
        if problem is not None:
            raise CheckpointError(f"checkpoint {self.path(step)} is damaged: {problem}; {remedy}")

    def remove_after(self, step: int) -> None:
        """Remove checkpoints of later steps, which a run that continues from ``step`` will write again."""
        for later in [each for each in self.available() if each > step]:
            logger.warning("removing checkpoint %s: the run continues from step %d", self.path(later), step)
            remove_directory(self.path(later))

    def remove_partial(self) -> None:
        """Remove partly written checkpoints that a kill left."""
        remove_leftovers(self.directory)

    def _run(self) -> str | None:
        """The identity of the run; None if it has none."""
        if self._run_id is None or not self._run_id.is_file():
            return None
        return self._run_id.read_text(encoding="utf-8").strip() or None


def write_manifest(directory: Path, step: int, run: str | None) -> None:
    """Write the manifest of a checkpoint whose other files are complete."""
    files = {name: _checksum(directory / name) for name in _files(directory)}
    content = {"step": step, "run": run, "files": files}
    (directory / MANIFEST).write_text(json.dumps({**content, "checksum": _checksum_of(content)}, indent=1))


def recorded_run(directory: Path) -> str | None:
    """The identity of the run that the newest readable checkpoint names; None if there is none."""
    for manifest in sorted(directory.glob(f"step_*/{MANIFEST}"), reverse=True):
        try:
            run = json.loads(manifest.read_bytes())["run"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(run, str):
            return run
    return None


def find_damage(directory: Path, step: int | None = None, run: str | None = None) -> str | None:
    """Describe what is wrong with a checkpoint; None if every file is listed and present and matches its checksum.

    Args:
        directory: The checkpoint.
        step: The step that it must be of; by default any.
        run: The identity of the run that it must be of; by default any. Earlier versions did not record it.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        files = manifest["files"] if isinstance(manifest, dict) else None
        if not isinstance(files, dict) or not files:
            return f"{MANIFEST} lists no files"
        own = manifest.pop("checksum", None)
        if own is not None and own != _checksum_of(manifest):
            return f"{MANIFEST} does not match its checksum"
        if step is not None and manifest.get("step", step) != step:
            return f"it is the checkpoint of step {manifest['step']}"
        if run is not None and manifest.get("run") not in (None, run):
            return "it belongs to another run"
        if own is None and (unlisted := [name for name in _files(directory) if name not in files]):
            return f"{MANIFEST} does not list {unlisted[0]}"
        for name, checksum in files.items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if _checksum(path) != checksum:
                return f"{name} does not match its checksum"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    except KeyError:
        return f"{MANIFEST} lists no files"
    return None


def save_torch(state: Any, path: Path) -> None:
    """Call `torch.save` on a Python file object, so that a full disk is reported as such."""
    with path.open("wb") as file:
        torch.save(state, file)


def _files(directory: Path) -> list[str]:
    """The names of all files of a checkpoint but the manifest, sorted."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return [str(path.relative_to(directory)) for path in paths if path != directory / MANIFEST]


def _checksum_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
