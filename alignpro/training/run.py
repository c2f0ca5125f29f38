"""The run: its directory, and the loop that every training job shares.

A run directory is the only state: ``config.yaml``, ``metrics.jsonl``, ``samples.jsonl``, ``checkpoints/`` and, when the
run has ended, ``model/``.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from alignpro.config import RunConfig, Section
from alignpro.errors import AlignProError, CheckpointError, Interrupted, TrainingError
from alignpro.progress import progress_bar
from alignpro.training.checkpoint import (
    CheckpointStore,
    disk_errors,
    random_state,
    restore_random_state,
    save_torch,
    seed_random_state,
)
from alignpro.training.durability import replace_directory
from alignpro.training.metrics import Metrics, MetricsLog, import_wandb
from alignpro.training.run_directory import RunDirectory
from alignpro.training.stop_signals import stop_signals

logger = logging.getLogger(__name__)


class Task(Protocol):
    """What a run repeats: a step of training, with its state."""

    @property
    def headline(self) -> Sequence[str]:
        """Metrics that the progress bar shows."""

    @property
    def updates(self) -> int:
        """Optimizer steps begun so far: whether a step that failed can have changed anything."""

    def step(self, step: int) -> Metrics:
        """Make training step ``step`` (counted from 0)."""

    def evaluate(self, step: int) -> Metrics:
        """Metrics on held-out data after step ``step``, each named ``eval/…``; none where no data is held out."""

    def save(self, directory: Path) -> dict[str, Any]:
        """Write weights and optimizers into a directory; returns the rest of the state, as JSON."""

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """Take up what `save` left."""

    def export(self, directory: Path) -> None:
        """Write the trained model for ``from_pretrained``."""


class Run:
    """A run directory that is open for training; a context manager, since it keeps other processes out of it.

    What can be known without the models is checked here, before they are loaded; and the global random generators are
    set by the run's seed.

    Args:
        config: The whole configuration of the job, which has a section ``run``.
        resume: Continue a run that is there; where there is none, start it.
        at: The step to continue from; the newest whole checkpoint when absent.

    Raises:
        TrainingError: The directory holds a run and ``resume`` was not asked for, or another process is writing to it,
            or the configuration is not that of the run.
        CheckpointError: There are checkpoints and every one is damaged, or that of ``at`` is.
    """

    def __init__(self, config: Section, *, resume: bool = False, at: int | None = None) -> None:
        self.config: RunConfig = config.run  # type: ignore[attr-defined]
        self.out = self.config.out
        self.checkpoints = CheckpointStore(self.out / "checkpoints", self.config.keep_checkpoints)
        self._description = config.model_dump(mode="json")
        if self.config.wandb_project:
            import_wandb()
        self._directory = RunDirectory(config, self.out, resume=resume)
        self.start = 0
        """The step to go on from."""
        try:
            self.checkpoints.clean()
            self.finished = at is None and self._directory.exported_step() == self.config.steps
            """Whether every step has been made and ``model/`` is in place."""
            if not self.finished:
                self.start = self._find_start(at)
                # For what draws from the global generators: an adapter's first weights, dropout, a reward of the user.
                seed_random_state(self.config.seed)
        except BaseException:
            self.close()
            raise

    def train(self, task: Task) -> None:
        """Run the task to its last step, with checkpoints, metrics and a clean stop on SIGTERM and SIGINT.

        Raises:
            Interrupted: A signal came; the state is saved.
            CheckpointError: A checkpoint cannot be read or written.
            AlignProError: The task failed; what it had reached before the failing step is saved.
        """
        if self.finished:
            return
        self._restore(task)
        with (
            MetricsLog(self.config, self.start, self._description) as log,
            progress_bar(self.config.steps, self.start, task.headline) as advance,
            stop_signals() as stop,
        ):
            if self._evaluation_due(self.start) and not log.has_evaluation(self.start):
                self._evaluate(self.start, task, log)
            for step in range(self.start, self.config.steps):
                with self._saved_on_failure(step, task, log):
                    metrics = task.step(step)
                log.write(step + 1, metrics)
                advance(metrics)
                if self._evaluation_due(step + 1):
                    self._evaluate(step + 1, task, log)
                last = step + 1 == self.config.steps
                if (step + 1) % self.config.checkpoint_every == 0 or last or stop:
                    self._save(step + 1, task, log)
                if stop and not last:
                    raise Interrupted(stop[0], self.checkpoints.path(step + 1))
            self._export(task)

    def close(self) -> None:
        """Let other processes use the directory."""
        self._directory.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _evaluation_due(self, step: int) -> bool:
        return self.config.eval_every > 0 and step > 0 and step % self.config.eval_every == 0

    def _evaluate(self, step: int, task: Task, log: MetricsLog) -> None:
        """Log metrics on held-out data; a resume from a checkpoint of this step makes up for a failure here."""
        with self._saved_on_failure(step, task, log):
            metrics = task.evaluate(step - 1)
        if metrics:
            log.write(step, metrics)

    def _save(self, step: int, task: Task, log: MetricsLog, randomness: dict[str, Any] | None = None) -> None:
        def write(directory: Path) -> None:
            state = {"step": step, "task": task.save(directory)}
            (directory / "state.json").write_text(json.dumps(state, indent=1))
            save_torch(random_state() if randomness is None else randomness, directory / "random.pt")

        log.sync()
        self.checkpoints.save(step, write)

    @contextmanager
    def _saved_on_failure(self, step: int, task: Task, log: MetricsLog) -> Iterator[None]:
        """Keep what was reached before a failure, unless the failing step may have changed weights by then."""
        updates, randomness = task.updates, random_state()
        try:
            yield
        except Exception as error:
            if task.updates == updates and step not in self.checkpoints.available():
                try:
                    self._save(step, task, log, randomness)
                except AlignProError as unsaved:  # told beside the failure itself, which the user must see
                    logger.warning("%s", unsaved)
            if step in self.checkpoints.available():
                logger.warning("the state after step %d is in %s", step, self.checkpoints.path(step))
            if isinstance(error, torch.OutOfMemoryError):
                raise TrainingError(
                    f"out of memory after step {step}: {error}; lower optimizer.micro_batch_size or rollout.max_batch in a "
                    "new run, or free the device and --resume"
                ) from error
            raise

    def _find_start(self, at: int | None) -> int:
        if at is not None:
            self.checkpoints.require(at)
        step = self.checkpoints.latest() if at is None else at
        if step is None and self._directory.exported_step() is not None:
            raise CheckpointError(f"{self.checkpoints.directory}: no checkpoint, although the run has made its model/")
        if step is not None and step > self.config.steps:
            raise TrainingError(
                f"run directory {self.out}: is at step {step}, beyond run.steps={self.config.steps}; raise run.steps, or "
                "go back with --at"
            )
        return step or 0

    def _restore(self, task: Task) -> None:
        """Take up the checkpoint of `start`, and drop what came after it."""
        if self.start in self.checkpoints.available():
            directory = self.checkpoints.path(self.start)
            try:
                state = json.loads((directory / "state.json").read_text())
                task.load(directory, state["task"])
                restore_random_state(torch.load(directory / "random.pt", weights_only=True))
            except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
                raise CheckpointError(f"checkpoint {directory}: cannot be read: {error}") from error
            logger.info("continuing from %s", directory)
        self.checkpoints.discard_after(self.start)
        self._directory.discard_export_after(self.start)

    def _export(self, task: Task) -> None:
        """Put the trained model in place."""

        def write(directory: Path) -> None:
            task.export(directory)
            self._directory.mark_export(directory, self.config.steps)

        with disk_errors(f"{self._directory.model}", "make room, then --resume"):
            replace_directory(self._directory.model, write)
