"""The logger of a run's metrics, which writes to metrics.jsonl, TensorBoard and, if configured, Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from alignpro.config import RunConfig
from alignpro.training.durability import fsync
from alignpro.training.loggers.jsonl import append_row, log_errors, read_rows, truncate_rows
from alignpro.training.loggers.tensorboard import TensorBoardWriter
from alignpro.training.loggers.wandb import start_wandb


class MetricsLogger:
    """Appends metrics to a run directory; a context manager.

    Args:
        config: The run directory, and the other loggers to use.
        from_step: Rows of later steps are removed from metrics.jsonl and samples.jsonl: they come from a run that
            continued past its last checkpoint.
        description: The resolved configuration, for Weights & Biases.

    Raises:
        ConfigError: Weights & Biases is configured but not installed.
        TrainingError: A file cannot be written, or Weights & Biases returns an error.
    """

    def __init__(self, config: RunConfig, from_step: int, description: Mapping[str, Any]) -> None:
        self.path = config.out / "metrics.jsonl"
        self._files = (self.path, config.out / "samples.jsonl")
        for path in self._files:
            truncate_rows(path, from_step)
        self._tensorboard = TensorBoardWriter(config.out / "tensorboard", from_step + 1) if config.tensorboard else None
        self._wandb = start_wandb(config, description) if config.wandb_project else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step (counted from 1).

        Raises:
            TrainingError: The row cannot be written to disk; earlier rows are intact.
        """
        append_row(self.path, {"step": step, **metrics})
        if self._tensorboard:
            self._tensorboard.write(step, metrics)
        if self._wandb:
            self._wandb.log(dict(metrics), step=step)

    def has_evaluation(self, step: int) -> bool:
        """Whether a step's metrics on held-out data are in metrics.jsonl."""
        rows = (row for row in read_rows(self.path) if row["step"] == step)
        return any(name.startswith("eval/") for row in rows for name in row)

    def fsync(self) -> None:
        """Flush every row to disk: a power cut must not leave a checkpoint without the metrics that precede it.

        Raises:
            TrainingError: The rows cannot be written to disk.
        """
        for path in self._files:
            if path.exists():
                with log_errors(path):
                    fsync(path)

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish(exit_code=0 if error is None else 1)
