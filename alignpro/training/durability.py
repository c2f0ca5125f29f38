"""Writing files so that they survive a kill or a power cut: under a temporary name, synced to disk, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from alignpro.errors import AlignProError, CheckpointError

PARTIAL = ".partial-"
"""Prefix of the name of a file or directory that is being written; `remove_leftovers` removes those left over."""
_DISCARDED = ".discarded-"
_REPLACED = ".replaced-"
"""Prefix of the name of a whole directory while its successor takes its place; `remove_leftovers` puts it back if none has."""


def fsync(path: Path) -> None:
    """Flush the content of a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically: at any moment ``path`` is the old file or the complete new one."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically: at any moment ``path`` is the old file, absent, or the complete new one.

    Args:
        path: Path of the file.
        write: Writes the file whose path it is given.
    """
    temporary = path.with_name(f"{PARTIAL}{path.name}")
    try:
        write(temporary)
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_directory(final: Path, write: Callable[[Path], None]) -> None:
    """Write a directory: at any moment ``final`` is the old directory, absent, or the complete new one.

    Args:
        final: Path of the directory.
        write: Writes the files into the empty directory that it is given.
    """
    temporary, replaced = (final.with_name(f"{prefix}{final.name}") for prefix in (PARTIAL, _REPLACED))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            fsync(path)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        temporary.rename(final)
        fsync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        shutil.rmtree(temporary, ignore_errors=True)  # frees space if the disk is full
        raise


def remove_directory(directory: Path) -> None:
    """Remove a directory if it exists. It is renamed first, so that ``directory`` is never a partly removed one."""
    temporary = directory.with_name(f"{_DISCARDED}{directory.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    if directory.exists():
        directory.rename(temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def is_leftover(path: Path) -> bool:
    """Whether this is a file or directory that a kill left partly written or partly removed."""
    return path.name.startswith((PARTIAL, _DISCARDED, _REPLACED))


def remove_leftovers(directory: Path) -> None:
    """Remove partly written and partly removed files and directories that a kill left in a directory.

    A directory without its successor is put back.
    """
    for path in list(filter(is_leftover, directory.glob(".*"))):
        final = path.with_name(path.name.removeprefix(_REPLACED))
        if final != path and not final.exists():
            path.rename(final)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def disk_errors(what: str, remedy: str, kind: type[AlignProError] = CheckpointError) -> Iterator[None]:
    """Turn a failure to write into an error that names what could not be written, why, and the remedy."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap the OSError
        causes = list(_causes(error))
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):  # torch wraps that as well
            raise KeyboardInterrupt from error
        # Prefer the operating system's message to that of the library that wraps it.
        reason = next((cause for cause in causes if isinstance(cause, OSError)), error)
        raise kind(f"{what}: cannot be written: {reason}; {remedy}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and the chain of errors that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
