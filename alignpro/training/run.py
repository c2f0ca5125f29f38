"""The run: its directory, and the loop that every training job shares.

A run directory is the only state: ``config.yaml``, ``metrics.jsonl``, ``samples.jsonl``, ``checkpoints/`` and, when the
run has ended, ``model/``.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any, Protocol

import torch
import yaml

from alignpro.config import RunConfig, Section, dump_config
from alignpro.errors import CheckpointError, TrainingError
from alignpro.progress import progress_bar
from alignpro.training.checkpoint import CheckpointStore, random_state, restore_random_state
from alignpro.training.metrics import Metrics, MetricsLog, keep_rows

logger = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818 - no error: the run was told to stop and its state is saved
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, signum: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name}; state saved in {checkpoint}; continue with --resume"
        )
        self.signum = signum


class Task(Protocol):
    """What a run repeats: a step of training, with its state."""

    headline: tuple[str, ...]
    """Metrics that the progress bar shows."""

    @property
    def updates(self) -> int:
        """Optimizer steps made so far: whether a step that failed has changed anything."""

    def step(self, step: int) -> Metrics:
        """Make training step ``step`` (counted from 0)."""

    def evaluate(self, step: int) -> Metrics:
        """Metrics on held-out data, each named ``eval/…``."""

    def save(self, directory: Path) -> dict[str, Any]:
        """Write weights and optimizers into a directory; returns the rest of the state, as JSON."""

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """Take up what `save` left."""

    def export(self, directory: Path) -> None:
        """Write the trained model for ``from_pretrained``."""


class Run:
    """A run directory that is open for training.

    Args:
        config: The whole configuration of the job, which has a section ``run``.
        resume: Continue a run that is there.
        at: The step to continue from; the newest whole checkpoint when absent.

    Raises:
        TrainingError: The directory holds a run and ``resume`` was not asked for, or another process is writing to it,
            or the configuration is not that of the run.
    """

    def __init__(self, config: Section, *, resume: bool = False, at: int | None = None) -> None:
        self.config: RunConfig = config.run  # type: ignore[attr-defined]
        self.out = self.config.out
        self.checkpoints = CheckpointStore(self.out / "checkpoints", self.config.keep_checkpoints)
        self._at = at
        exists = (self.out / "config.yaml").is_file()
        if exists and not resume:
            raise TrainingError(f"run directory {self.out}: holds a run already; add --resume, or name another run.out")
        if self.out.is_dir() and not exists and any(p.name != "run.lock" for p in self.out.iterdir()):
            raise TrainingError(f"run directory {self.out}: is not empty and holds no run; name another run.out")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.out / "run.lock")
            if exists:
                self._check_same(config)
            _write_atomically(self.out / "config.yaml", dump_config(config))
        except OSError as error:
            raise TrainingError(f"run directory {self.out}: cannot be written: {error}") from error
        self._description = config.model_dump(mode="json")

    def train(self, task: Task) -> None:
        """Run the task to its last step, with checkpoints, metrics and a clean stop on SIGTERM and SIGINT.

        Raises:
            Interrupted: A signal came; the state is saved.
        """
        start = self._restore(task)
        log = MetricsLog(self.config, start, self._description)
        keep_rows(self.out / "samples.jsonl", start)
        try:
            with stop_signals() as stop, progress_bar(self.config.steps, start, task.headline) as advance:
                for step in range(start, self.config.steps):
                    with self._saved_on_failure(step, task):
                        metrics = task.step(step)
                    log.write(step + 1, metrics)
                    advance(metrics)
                    if _due(step + 1, self.config.eval_every):
                        with self._saved_on_failure(step + 1, task):
                            log.write(step + 1, task.evaluate(step))
                    last = step + 1 == self.config.steps
                    if _due(step + 1, self.config.checkpoint_every) or last or stop:
                        self._save(step + 1, task)
                    if stop and not last:
                        raise Interrupted(stop[0], self.checkpoints.path(step + 1))
            self._export(task)
        finally:
            log.close()

    def _save(self, step: int, task: Task) -> None:
        def write(directory: Path) -> None:
            state = {"step": step, "task": task.save(directory)}
            (directory / "state.json").write_text(json.dumps(state, indent=1))
            torch.save(random_state(), directory / "random.pt")

        self.checkpoints.save(step, write)

    @contextmanager
    def _saved_on_failure(self, step: int, task: Task) -> Iterator[None]:
        """Keep what was computed before a failure, unless the failing step had changed weights by then."""
        updates = task.updates
        try:
            yield
        except Exception:
            if task.updates == updates and step not in self.checkpoints.available():
                with suppress(CheckpointError):  # the failure itself is what the user must see
                    self._save(step, task)
            if step in self.checkpoints.available():
                logger.warning("the state after step %d is in %s", step, self.checkpoints.path(step))
            raise

    def _restore(self, task: Task) -> int:
        step = self._at if self._at is not None else self.checkpoints.latest()
        if step is None:
            return 0
        directory = self.checkpoints.path(step)
        if not directory.is_dir():
            have = ", ".join(map(str, self.checkpoints.available())) or "none"
            raise CheckpointError(f"{directory}: no such checkpoint; there are: {have}")
        try:
            state = json.loads((directory / "state.json").read_text())
            task.load(directory, state["task"])
            restore_random_state(torch.load(directory / "random.pt", weights_only=True))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint {directory}: cannot be read: {error}") from error
        logger.info("continuing from %s", directory)
        return int(state["step"])

    def _export(self, task: Task) -> None:
        """Write ``model/`` aside and put it in place."""
        partial = self.out / ".partial-model"
        final = self.out / "model"
        _remove(partial)
        try:
            task.export(partial)
            _remove(final)
            partial.rename(final)
        except OSError as error:
            raise CheckpointError(f"{final}: cannot be written: {error}; make room, then --resume") from error

    def _check_same(self, config: Section) -> None:
        """A resumed run goes on with its own configuration; only the section ``run`` may differ (but for its seed)."""
        before = yaml.safe_load((self.out / "config.yaml").read_text())
        after = yaml.safe_load(dump_config(config))
        free = {key for key in before["run"] if key != "seed"}
        changed = sorted(
            key
            for key, (old, new) in _differences(before, after).items()
            if not (key.startswith("run.") and key.removeprefix("run.") in free) and old != new
        )
        if changed:
            raise TrainingError(
                f"run directory {self.out}: --resume with another configuration than the run's: {', '.join(changed)}; "
                f"take the values of {self.out / 'config.yaml'}, or name another run.out"
            )


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of dying; a second one acts as usual."""
    received: list[int] = []
    previous = {}

    def handle(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        logger.warning("%s: stopping after this step", signal.Signals(signum).name)
        signal.signal(signum, previous[signum])

    for signum in (signal.SIGTERM, signal.SIGINT):
        previous[signum] = signal.signal(signum, handle)
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _lock(path: Path) -> IO[str]:
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TrainingError(f"run directory {path.parent}: another process is training in it") from None
    return file


def _write_atomically(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text)
    aside.replace(path)


def _remove(directory: Path) -> None:
    if directory.is_dir():
        shutil.rmtree(directory)


def _differences(before: Any, after: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key → (before, after), of the leaves of two nested mappings that differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in before.keys() | after.keys():
            found |= _differences(before.get(key), after.get(key), f"{prefix}{key}.")
        return found
    return {prefix.rstrip("."): (before, after)} if before != after else {}
