"""TensorBoard's event files."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignpro.training.loggers.jsonl import log_errors


class TensorBoardWriter:
    """Writes scalars in TensorBoard's format with TensorBoard's own record writer.

    ``SummaryWriter`` writes from a background thread, where a full disk causes a traceback on the terminal and an error
    some steps later. This class raises the error at once.

    Args:
        directory: The directory to pass to ``tensorboard --logdir``.
        from_step: Events in earlier files are void from this step on (the run was resumed from an earlier one).

    Raises:
        TrainingError: The file cannot be created.
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
        with log_errors(self.path):
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
        with log_errors(self.path):
            self._writer.write(self._event(wall_time=time.time(), **content).SerializeToString())
            self._writer.flush()
