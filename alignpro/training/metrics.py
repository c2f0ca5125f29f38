"""Metrics: one JSON object a step in metrics.jsonl, and the same to TensorBoard and, if asked, Weights & Biases."""

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
"""What metrics begin with that tell how a step was carried out, on which clock, with what left in the engine's cache and how
that was rounded, and not what it did. A run that was interrupted and goes on has others there; all other metrics are the
same, bit for bit, on a CPU.
"""


class PhaseTimer:
    """Seconds a phase of the step took, as metrics ``seconds/<phase>``.

    Args:
        begin: Told the name of each phase when it begins.
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
    """Takes the metrics of steps."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step (counted from 1)."""

    def has_evaluation(self, step: int) -> bool:
        """Whether the metrics on held-out data of a step are there."""

    def sync(self) -> None:
        """Have the disk hold every row."""


class NoMetricsLog:
    """Keeps nothing: for ranks whose metrics another one writes."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Forget them."""

    def has_evaluation(self, step: int) -> bool:
        """Never."""
        return False

    def sync(self) -> None:
        """There is nothing to hold."""


class MetricsLog:
    """Appends metrics to a run directory; a context manager.

    Args:
        config: Where, and to what else.
        from_step: Rows of later steps, in metrics.jsonl and samples.jsonl, are removed: they were left by a run that went
            on after its last checkpoint.
        description: The resolved configuration, for Weights & Biases.

    Raises:
        ConfigError: Weights & Biases is asked for and not installed.
        TrainingError: A file cannot be written, or Weights & Biases refuses.
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
            TrainingError: The disk refuses; rows before this one are intact.
        """
        append_row(self.path, {"step": step, **metrics})
        if self._tensorboard:
            self._tensorboard.write(step, metrics)
        if self._wandb:
            self._wandb.log(dict(metrics), step=step)

    def has_evaluation(self, step: int) -> bool:
        """Whether the metrics on held-out data of a step are there."""
        rows = (row for row in read_rows(self.path) if row["step"] == step)
        return any(name.startswith("eval/") for row in rows for name in row)

    def sync(self) -> None:
        """Have the disk hold every row: a checkpoint must not outlive, in a power cut, the metrics that led to it.

        Raises:
            TrainingError: The disk refuses.
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
    """Scalars in TensorBoard's format, by TensorBoard's own record writer.

    ``SummaryWriter`` writes from a thread of its own, where a full disk is a traceback on the terminal and an error some
    steps later; here it is an error at once.

    Args:
        directory: What ``tensorboard --logdir`` is given.
        from_step: What earlier files hold from this step on is void (the run was resumed from before it).
    """

    def __init__(self, directory: Path, from_step: int) -> None:
        # Imported here: half a second, and not every run wants it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        # TensorBoard reads the files of a directory in the order of their names.
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
            TrainingError: The disk refuses.
        """
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        """Close the file; every event is in it by now."""
        with suppress(OSError):  # an event that the disk refused, of which `write` has told
            self._file.close()

    def _add(self, **content: Any) -> None:
        with _disk_errors(self.path):
            self._writer.write(self._event(wall_time=time.time(), **content).SerializeToString())
            self._writer.flush()


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON object as a line.

    Raises:
        TrainingError: The disk refuses; the file is as it was.
    """
    # Lone surrogates, which UTF-8 cannot hold, become the JSON escapes that they are written with.
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
    """The rows of a JSON Lines file that this module wrote; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [row for _, row in _whole_rows(file)]


def keep_rows(path: Path, last_step: int) -> None:
    """Cut the rows after ``last_step``, and a line cut short by a kill, off the end of a file of rows in order of steps.

    Raises:
        TrainingError: The disk refuses.
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
    """Weights & Biases.

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
    """(bytes of the line, row) up to the first line that is no whole row."""
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
    """A run there that a resumed run here goes on with: its id is kept beside the metrics."""
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
    """Mean of each metric; a norm that is infinite belongs to an update that was skipped, and is counted instead."""
    metrics = weighted_mean(updates)
    for name in [each for each in metrics if each.endswith("gradient_norm")]:
        norms = [update[name] for update in updates if isfinite(update[name])]
        metrics[name] = sum(norms) / max(1, len(norms))
        if skipped := len(updates) - len(norms):
            metrics[name.replace("gradient_norm", "updates_skipped")] = float(skipped)
    return metrics


def weighted_mean(rows: Sequence[Metrics], weights: Sequence[int] | None = None) -> Metrics:
    """Weighted mean of each metric; the rows have the same ones."""
    weights = [1] * len(rows) if weights is None else weights
    names = rows[0] if rows else ()
    return {name: sum(row[name] * w for row, w in zip(rows, weights, strict=True)) / sum(weights) for name in names}
