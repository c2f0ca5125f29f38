"""JSON Lines files with one row per step, which survive a kill and a full disk."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from alignpro.errors import TrainingError
from alignpro.training.durability import disk_errors

logger = logging.getLogger(__name__)


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
    """Read the rows of a file that `append_row` wrote, except a last line truncated by a kill.

    A damaged row is left out, with a warning that names it.
    """
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [row for _, row in _complete_rows(path, file)]


def truncate_rows(path: Path, last_step: int) -> None:
    """Remove the rows after ``last_step``, and a line truncated by a kill, from a file whose rows are in step order.

    A damaged row between others stays, with a warning that names it.

    Raises:
        TrainingError: The file cannot be written.
    """
    if not path.is_file():
        return
    with log_errors(path), path.open("rb+") as file:
        end = 0
        for row_end, row in _complete_rows(path, file):
            if row["step"] > last_step:
                break
            end = row_end
        file.truncate(end)


def log_errors(path: Path) -> AbstractContextManager[None]:
    """Turn a failure to write a log into a `TrainingError` that names the file."""
    return disk_errors(f"{path}", "make room, then continue from the last checkpoint with --resume", TrainingError)


def _complete_rows(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (byte at which the line ends, row) of each line that is a complete row."""
    end = 0
    for number, line in enumerate(lines, start=1):
        end += len(line)
        if not line.endswith(b"\n"):
            return  # truncated by a kill
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield end, row
        else:
            logger.warning("%s:%d: the row is damaged and left out", path, number)
