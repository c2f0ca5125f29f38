"""Writing files so that they survive a kill or a power cut: under a temporary name, synced to disk, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

PARTIAL = ".partial-"
"""Prefix of the name of a file or directory that is being written; `clean` removes those left over."""
_DISCARDED = ".discarded-"


def sync(path: Path) -> None:
    """Flush the content of a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically: at any moment ``path`` is the old file or the complete new one."""
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
    """Write a directory: at any moment ``final`` is the old directory, absent, or the complete new one.

    Args:
        final: Path of the directory.
        write: Writes the files into the empty directory that it is given.
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
        shutil.rmtree(aside, ignore_errors=True)  # frees space if the disk is full
        raise


def discard(directory: Path) -> None:
    """Remove a directory if it exists. It is renamed first, so that ``directory`` is never a partly removed one."""
    aside = directory.with_name(f"{_DISCARDED}{directory.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if directory.exists():
        directory.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def is_leftover(path: Path) -> bool:
    """Whether this is a file or directory that a kill left partly written or partly removed."""
    return path.name.startswith((PARTIAL, _DISCARDED))


def clean(directory: Path) -> None:
    """Remove partly written and partly removed files and directories that a kill left in a directory."""
    for path in filter(is_leftover, directory.glob(".*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
