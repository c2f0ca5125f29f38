"""What an experiment remembers of a cell: how long it took, and why it failed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from alignpro.training.durability import replace_text

State = Literal["done", "failed", "stopped"]


@dataclass(frozen=True)
class CellRecord:
    """The content of a cell's ``cell.json``."""

    state: State
    seconds: float
    """Of all attempts together."""
    command: str
    """What repeats the cell."""
    error: str | None = None
    versions: dict[str, str] | None = None

    def after(self, previous: CellRecord | None) -> CellRecord:
        """This attempt together with those before."""
        return self if previous is None else replace(self, seconds=self.seconds + previous.seconds)

    def write(self, directory: Path) -> None:
        """Write it to the cell's directory, atomically."""
        replace_text(directory / _FILE, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


_FILE = "cell.json"


def read_record(directory: Path) -> CellRecord | None:
    """The record of a cell; None if it has not been tried, or was killed in its first attempt."""
    try:
        return CellRecord(**json.loads((directory / _FILE).read_text()))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None
