"""Checkpoints that survive a kill at any moment and are checked before they are trusted.

A checkpoint is written aside, synced to disk and renamed; its manifest holds a checksum of every file. What is found
damaged is passed over, with a warning, for the one before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from alignpro.errors import CheckpointError
from alignpro.training.durability import clean, discard, replace_directory

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class CheckpointStore:
    """The checkpoints of a run.

    Args:
        directory: Where they are: ``step_000050`` and so on.
        keep: How many of the newest stay.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Write a checkpoint: ``write`` puts its files in the directory it is given.

        Raises:
            CheckpointError: The disk refused (full, read-only, …). Earlier checkpoints are as they were.
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
                discard(self.path(old))
        return final

    def available(self) -> list[int]:
        """Steps that have a checkpoint, oldest first; damaged ones included."""
        found = (re.fullmatch(r"step_(\d+)", path.name) for path in self.directory.glob("step_*"))
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.directory / f"step_{step:06d}"

    def latest(self) -> int | None:
        """The newest step whose checkpoint is whole; None when there is no checkpoint at all.

        Raises:
            CheckpointError: There are checkpoints, and every one of them is damaged.
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
        """Make sure that a step has a whole checkpoint.

        Raises:
            CheckpointError: It has none, or a damaged one.
        """
        if step not in self.available():
            have = ", ".join(map(str, self.available())) or "none"
            raise CheckpointError(f"{self.path(step)}: no such checkpoint; there are: {have}")
        problem = find_damage(self.path(step))
        if problem is not None:
            raise CheckpointError(
                f"checkpoint {self.path(step)} is damaged: {problem}; leave --at out, or name another"
            )

    def discard_after(self, step: int) -> None:
        """Remove checkpoints of later steps, which a run that goes on from ``step`` will make again."""
        for later in [each for each in self.available() if each > step]:
            logger.warning("checkpoint %s is removed: the run goes on from step %d", self.path(later), step)
            discard(self.path(later))

    def clean(self) -> None:
        """Remove what a kill left half written."""
        clean(self.directory)


def find_damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file is there with its checksum."""
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
                return f"{name} does not have its checksum"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    except KeyError:
        return f"{MANIFEST} lists no files"
    return None


@contextmanager
def disk_errors(what: str, remedy: str) -> Iterator[None]:
    """Tell what the disk refuses as a `CheckpointError`: what could not be written, why, and the remedy."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap what the disk says
        causes = list(_causes(error))
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):  # torch wraps that as well
            raise KeyboardInterrupt from error
        # The system's own words, where they are behind the error of a library.
        reason = next((cause for cause in causes if isinstance(cause, OSError)), error)
        raise CheckpointError(f"{what}: cannot be written: {reason}; {remedy}") from error


def save_torch(state: Any, path: Path) -> None:
    """`torch.save`, through a Python file: so the error of a full disk is told as such."""
    with path.open("wb") as file:
        torch.save(state, file)


def seed_random_state(seed: int) -> None:
    """Set every global generator by one seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of every global generator: Python, NumPy, torch and its accelerators."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).copy()), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set every global generator to a state of `random_state`; those of devices only where there are as many."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
