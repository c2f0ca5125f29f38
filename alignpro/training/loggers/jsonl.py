"""JSON Lines files with one row per step, which survive a kill and a full disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from alignpro.errors import TrainingError
from alignpro.training.durability import disk_errors


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON object as a line.

    Raises:
        TrainingError: The row cannot be written; the file is unchanged.
    """
    # UTF-8 cannot encode lone surrogates; "backslashreplace" turns them into JSON escapes.
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    with log_errors(path):
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as file:
                file.write(line)
        except OSError:
            with suppress(OSError):
                os.truncate(path, size)
            raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file that `append_row` wrote, except a last line truncated by a kill."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [row for _, row in _complete_rows(file)]


def truncate_rows(path: Path, last_step: int) -> None:
    """Remove the rows after ``last_step``, and a line truncated by a kill, from a file whose rows are in step order.

    Raises:
        TrainingError: The file cannot be written.
    """
    if not path.is_file():
        return
    with log_errors(path), path.open("rb+") as file:
        end = 0
        for size, row in _complete_rows(file):
            if row["step"] > last_step:
                break
            end += size
        file.truncate(end)


def log_errors(path: Path) -> AbstractContextManager[None]:
    """Turn a failure to write a log into a `TrainingError` that names the file."""
    return disk_errors(f"{path}", "make room, then continue from the last checkpoint with --resume", TrainingError)


def _complete_rows(lines: Iterator[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (bytes of the line, row) up to the first line that is not a complete row."""
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or not isinstance(row, dict) or not isinstance(row.get("step"), int):
            return
        yield len(line), row
