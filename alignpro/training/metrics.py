"""Metrics: one JSON object per step in metrics.jsonl, also logged to TensorBoard and, if configured, Weights & Biases."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol

from alignpro.config import RunConfig
from alignpro.errors import ConfigError, TrainingError
from alignpro.training.durability import sync

Metrics = dict[str, float]

OF_EXECUTION = ("seconds/", "engine/", "sample/logprob_difference")
"""Prefixes of metrics that describe how a step was executed (timings, contents of the engine's cache, rounding), not its
result. These may differ in a run that was interrupted and resumed; on a CPU, all other metrics are bit-identical.
"""


class PhaseTimer:
    """Measures the seconds that each phase of a step takes, as metrics ``seconds/<phase>``.

    Args:
        begin: Called with the name of each phase when it begins.
    """

    def __init__(self, begin: Callable[[str], None] | None = None) -> None:
        self.seconds: Metrics = {}
        self._begin = begin

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self._begin is not None:
            self._begin(phase)
        started = time.perf_counter()
        try:
            yield
        finally:
            key = f"seconds/{phase}"
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - started


class MetricsSink(Protocol):
    """Receives the metrics of each step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step (counted from 1)."""

    def has_evaluation(self, step: int) -> bool:
        """Whether a step's metrics on held-out data have been recorded."""

    def sync(self) -> None:
        """Flush every row to disk."""


class NoMetricsLog:
    """Discards metrics: for the ranks that do not write them."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Discard the metrics."""

    def has_evaluation(self, step: int) -> bool:
        """Return False: nothing is recorded."""
        return False

    def sync(self) -> None:
        """Do nothing: there is nothing to flush."""


class MetricsLog:
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
            keep_rows(path, from_step)
        self._tensorboard = EventFile(config.out / "tensorboard", from_step + 1) if config.tensorboard else None
        self._wandb = _start_wandb(config, description) if config.wandb_project else None

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

    def sync(self) -> None:
        """Flush every row to disk: a power cut must not leave a checkpoint without the metrics that precede it.

        Raises:
            TrainingError: The rows cannot be written to disk.
        """
        for path in self._files:
            if path.exists():
                with _disk_errors(path):
                    sync(path)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish(exit_code=0 if error is None else 1)


class EventFile:
    """Writes scalars in TensorBoard's format with TensorBoard's own record writer.

    ``SummaryWriter`` writes from a background thread, where a full disk causes a traceback on the terminal and an error
    some steps later. This class raises the error at once.

    Args:
        directory: The directory to pass to ``tensorboard --logdir``.
        from_step: Events in earlier files are void from this step on (the run was resumed from an earlier one).
    """

    def __init__(self, directory: Path, from_step: int) -> None:
        # Imported here: it takes half a second, and not every run uses TensorBoard.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        # TensorBoard reads the files of a directory in the order of their names, which start with the time.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path = directory / name
        with _disk_errors(self.path):
            directory.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("xb")
        self._writer = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        self._add(step=from_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a step.

        Raises:
            TrainingError: The event cannot be written to disk.
        """
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        """Close the file; all events have been flushed by now."""
        with suppress(OSError):  # caused by an event that could not be written, for which `write` has raised
            self._file.close()

    def _add(self, **content: Any) -> None:
        with _disk_errors(self.path):
            self._writer.write(self._event(wall_time=time.time(), **content).SerializeToString())
            self._writer.flush()


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON object as a line.

    Raises:
        TrainingError: The row cannot be written; the file is unchanged.
    """
    # UTF-8 cannot encode lone surrogates; "backslashreplace" turns them into JSON escapes.
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    with _disk_errors(path):
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as file:
                file.write(line)
        except OSError:
            with suppress(OSError):
                os.truncate(path, size)
            raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSON Lines file that this module wrote, except a last line truncated by a kill."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [row for _, row in _whole_rows(file)]


def keep_rows(path: Path, last_step: int) -> None:
    """Remove the rows after ``last_step``, and a line truncated by a kill, from a file whose rows are in step order.

    Raises:
        TrainingError: The file cannot be written.
    """
    if not path.is_file():
        return
    with _disk_errors(path), path.open("rb+") as file:
        kept = 0
        for size, row in _whole_rows(file):
            if row["step"] > last_step:
                break
            kept += size
        file.truncate(kept)


def import_wandb() -> ModuleType:
    """Import Weights & Biases.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "run.wandb_project needs Weights & Biases: pip install 'alignpro[wandb]', or leave the key out"
        ) from error
    module: ModuleType = wandb
    return module


def _whole_rows(lines: Iterator[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (bytes of the line, row) up to the first line that is not a complete row."""
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or not isinstance(row, dict) or not isinstance(row.get("step"), int):
            return
        yield len(line), row


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be written: {error}; make room, then continue from the last checkpoint with --resume"
        ) from error


def _start_wandb(config: RunConfig, description: Mapping[str, Any]) -> Any:
    """Start a Weights & Biases run, or continue it after a resume: its id is stored beside the metrics."""
    wandb = import_wandb()
    path = config.out / "wandb_id"
    with _disk_errors(path):
        if not path.is_file():
            path.write_text(uuid.uuid4().hex[:12])
        identity = path.read_text()
    try:
        return wandb.init(
            project=config.wandb_project, id=identity, resume="allow", dir=str(config.out), config=dict(description)
        )
    except wandb.errors.Error as error:
        raise TrainingError(
            f"Weights & Biases: {error}; log in with `wandb login`, set WANDB_MODE=offline, or leave run.wandb_project out"
        ) from error


def mean_of_updates(updates: Sequence[Metrics]) -> Metrics:
    """Mean of each metric. An infinite gradient norm marks a skipped update, which is counted instead of averaged."""
    metrics = weighted_mean(updates)
    for name in [each for each in metrics if each.endswith("gradient_norm")]:
        norms = [update[name] for update in updates if isfinite(update[name])]
        metrics[name] = sum(norms) / max(1, len(norms))
        if skipped := len(updates) - len(norms):
            metrics[name.replace("gradient_norm", "updates_skipped")] = float(skipped)
    return metrics


def weighted_mean(rows: Sequence[Metrics], weights: Sequence[int] | None = None) -> Metrics:
    """Weighted mean of each metric; all rows have the same metrics."""
    weights = [1] * len(rows) if weights is None else weights
    names = rows[0] if rows else ()
    return {name: sum(row[name] * w for row, w in zip(rows, weights, strict=True)) / sum(weights) for name in names}
