"""Checkpoints that survive a kill at any moment and are checked before they are trusted.

A checkpoint is written aside, synced to disk and renamed; its manifest holds a checksum of every file. What is found
damaged is passed over, with a warning, for the one before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignpro.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_PARTIAL = ".partial-"


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
        final = self.directory / f"step_{step:06d}"
        partial = self.directory / f"{_PARTIAL}{final.name}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write(partial)
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            manifest = {str(path.relative_to(partial)): _checksum(path) for path in files}
            (partial / MANIFEST).write_text(json.dumps({"step": step, "files": manifest}, indent=1))
            for path in [*files, partial / MANIFEST, partial]:
                _sync(path)
            if final.exists():  # a step that is saved again after a resume from before it
                shutil.rmtree(final)
            partial.rename(final)
            _sync(self.directory)
        except (OSError, RuntimeError, ValueError) as error:  # torch and safetensors wrap what the disk says
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint {final}: cannot be written: {error}; make room or name another run.out, then continue with "
                "--resume: earlier checkpoints are intact"
            ) from error
        for old in self.available()[: -self.keep]:
            shutil.rmtree(self.path(old))
        return final

    def available(self) -> list[int]:
        """Steps that have a checkpoint, oldest first; damaged ones included."""
        return sorted(int(path.name.removeprefix("step_")) for path in self.directory.glob("step_*") if path.is_dir())

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.directory / f"step_{step:06d}"

    def latest(self) -> int | None:
        """The newest step whose checkpoint is whole; None when there is no checkpoint at all.

        Raises:
            CheckpointError: There are checkpoints, and every one of them is damaged.
        """
        for leftover in self.directory.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        steps = self.available()
        for step in reversed(steps):
            problem = find_damage(self.path(step))
            if problem is None:
                return step
            logger.warning("checkpoint %s is damaged (%s): trying the one before", self.path(step), problem)
        if steps:
            raise CheckpointError(f"{self.directory}: every checkpoint is damaged; start again in another run.out")
        return None


def find_damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file is there with its checksum."""
    try:
        files = json.loads((directory / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST}: {error}"
    for name, checksum in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if _checksum(path) != checksum:
            return f"{name} does not have its checksum"
    return None


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
    """Set every global generator to a state of `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
