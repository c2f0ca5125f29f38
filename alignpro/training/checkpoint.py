"""Checkpoints that survive a kill at any moment and are verified before they are loaded.

A checkpoint is written under a temporary name, synced to disk and renamed; its manifest holds a checksum of every file.
A damaged checkpoint is skipped with a warning, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
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
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Write a checkpoint: ``write`` puts its files into the directory that it is given.

        Raises:
            CheckpointError: It cannot be written (disk full, read-only, …). Earlier checkpoints are intact.
        """

        def write_checked(directory: Path) -> None:
            write(directory)
            files = sorted(path for path in directory.rglob("*") if path.is_file())
            manifest = {str(path.relative_to(directory)): _checksum(path) for path in files}
            (directory / MANIFEST).write_text(json.dumps({"step": step, "files": manifest}, indent=1))

        final = self.path(step)
        with disk_errors(
            f"checkpoint {final}", "earlier checkpoints are intact: make room, then continue with --resume"
        ):
            replace_directory(final, write_checked)
            for old in self.available()[: -self.keep]:
                remove_directory(self.path(old))
        return final

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
            problem = find_damage(self.path(step))
            if problem is None:
                return step
            logger.warning("checkpoint %s is damaged (%s): trying the one before", self.path(step), problem)
        if steps:
            raise CheckpointError(f"{self.directory}: every checkpoint is damaged; start again in another run.out")
        return None

    def require(self, step: int) -> None:
        """Check that a step has an intact checkpoint.

        Raises:
            CheckpointError: The checkpoint is missing or damaged.
        """
        if step not in self.available():
            have = ", ".join(map(str, self.available())) or "none"
            raise CheckpointError(f"{self.path(step)}: no such checkpoint; there are: {have}")
        problem = find_damage(self.path(step))
        if problem is not None:
            raise CheckpointError(
                f"checkpoint {self.path(step)} is damaged: {problem}; omit --at, or name another step"
            )

    def remove_after(self, step: int) -> None:
        """Remove checkpoints of later steps, which a run that continues from ``step`` will write again."""
        for later in [each for each in self.available() if each > step]:
            logger.warning("removing checkpoint %s: the run continues from step %d", self.path(later), step)
            remove_directory(self.path(later))

    def remove_partial(self) -> None:
        """Remove partly written checkpoints that a kill left."""
        remove_leftovers(self.directory)


def find_damage(directory: Path) -> str | None:
    """Describe what is wrong with a checkpoint; None if every file is present and matches its checksum."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        files = manifest["files"] if isinstance(manifest, dict) else None
        if not isinstance(files, dict) or not files:
            return f"{MANIFEST} lists no files"
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


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
