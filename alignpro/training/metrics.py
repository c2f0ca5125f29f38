"""Metrics: one JSON object a step in metrics.jsonl, and the same to TensorBoard and, if asked, Weights & Biases."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from alignpro.config import RunConfig
from alignpro.errors import ConfigError

Metrics = dict[str, float]


class PhaseTimer:
    """Seconds a phase of the step took, as metrics ``seconds/<phase>``."""

    def __init__(self) -> None:
        self.seconds: Metrics = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            key = f"seconds/{phase}"
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - started


class MetricsLog:
    """Appends metrics to a run directory.

    Args:
        config: Where, and to what else.
        from_step: Rows of later steps, left by a run that went on after its last checkpoint, are removed.
        description: The resolved configuration, for Weights & Biases.

    Raises:
        ConfigError: Weights & Biases is asked for and not installed.
    """

    def __init__(self, config: RunConfig, from_step: int, description: Mapping[str, Any]) -> None:
        self.path = config.out / "metrics.jsonl"
        keep_rows(self.path, from_step)
        self._tensorboard = (
            SummaryWriter(str(config.out / "tensorboard"), purge_step=from_step + 1) if config.tensorboard else None
        )
        self._wandb = _start_wandb(config, description) if config.wandb_project else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step (counted from 1)."""
        append_row(self.path, {"step": step, **metrics})
        if self._tensorboard:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(metrics), step=step)

    def close(self) -> None:
        """Flush what is buffered."""
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON object as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file that this module wrote; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="surrogatepass").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def keep_rows(path: Path, last_step: int) -> None:
    """Drop the rows after ``last_step``, atomically."""
    if not path.is_file():
        return
    kept = [row for row in read_rows(path) if row["step"] <= last_step]
    aside = path.with_name(f".{path.name}.partial")
    aside.unlink(missing_ok=True)
    aside.touch()
    for row in kept:
        append_row(aside, row)
    aside.replace(path)


def _start_wandb(config: RunConfig, description: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("run.wandb_project needs Weights & Biases: pip install 'alignpro[wandb]'") from error
    return wandb.init(project=config.wandb_project, dir=str(config.out), config=dict(description), resume="allow")
