"""Files that survive a kill or a power cut: written aside, synced to disk, put in place by a rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

PARTIAL = ".partial-"
"""What the name of a thing begins with while it is being made; `clean` removes it."""
_DISCARDED = ".discarded-"


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names that a directory holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a text file: at any moment ``path`` is as it was, or new and whole."""
    aside = path.with_name(f"{PARTIAL}{path.name}")
    try:
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def replace_directory(final: Path, write: Callable[[Path], None]) -> None:
    """Write a directory: at any moment ``final`` is as it was, or absent, or new and whole.

    Args:
        final: Where it goes.
        write: Puts its files in the directory that it is given, which is there and empty.
    """
    aside = final.with_name(f"{PARTIAL}{final.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write(aside)
        for path in [*aside.rglob("*"), aside]:
            sync(path)
        discard(final)
        aside.rename(final)
        sync(final.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # makes room, where the disk is full
        raise


def discard(directory: Path) -> None:
    """Remove a directory, if it is there, such that its name never stands for half of it."""
    aside = directory.with_name(f"{_DISCARDED}{directory.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if directory.exists():
        directory.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def is_leftover(path: Path) -> bool:
    """Whether a kill left this behind: something half written, or half removed."""
    return path.name.startswith((PARTIAL, _DISCARDED))


def clean(directory: Path) -> None:
    """Remove what a kill left behind in a directory."""
    for path in filter(is_leftover, directory.glob(".*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
