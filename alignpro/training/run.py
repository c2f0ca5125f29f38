"""The run: its directory, and the training loop that all jobs share.

A run directory holds all state: ``config.yaml``, ``metrics.jsonl``, ``samples.jsonl``, ``checkpoints/`` and, once the run
has finished, ``model/``. Rank 0 writes it; the other ranks only add their parts of a checkpoint.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from alignpro.config import RunConfig, Section
from alignpro.distributed.ranks import Ranks
from alignpro.errors import AlignProError, CheckpointError, Interrupted, PeerError, TrainingError
from alignpro.training.checkpoint import (
    CheckpointStore,
    disk_errors,
    random_state,
    restore_random_state,
    save_torch,
    seed_random_state,
)
from alignpro.training.durability import replace_directory
from alignpro.training.metrics import Metrics, MetricsLog, MetricsSink, NoMetricsLog, import_wandb
from alignpro.training.progress import progress_bar
from alignpro.training.run_directory import RunDirectory
from alignpro.training.stop_signals import stop_signals

logger = logging.getLogger(__name__)

LAUNCHER_PATIENCE = 25.0
"""Seconds in which repeated signals to launched ranks count as one; the deepspeed launcher kills its ranks after 30."""


class Task(Protocol):
    """A training job: the step that a run repeats, and the job's state."""

    @property
    def progress_metrics(self) -> Sequence[str]:
        """Names of the metrics that the progress bar shows."""

    @property
    def updates(self) -> int:
        """Optimizer steps begun so far; a failed step that has not increased it has not changed the weights."""

    def step(self, step: int) -> Metrics:
        """Make training step ``step`` (counted from 0)."""

    def evaluate(self, step: int) -> Metrics:
        """Compute metrics on held-out data after step ``step``, named ``eval/…``; none if no data is held out."""

    def save(self, directory: Path) -> dict[str, Any]:
        """Write weights and optimizers into a directory; returns the rest of the state, serializable as JSON."""

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """Restore the state that `save` wrote."""

    def export(self, directory: Path) -> None:
        """Write the trained model in the format of ``from_pretrained``."""


class Run:
    """A run directory that is open for training; a context manager, because it locks other processes out.

    The constructor checks everything that it can before the models are loaded, and seeds the global random generators
    with the run's seed.

    Args:
        config: The job's whole configuration, which has a section ``run``.
        resume: Continue the run in the directory; start one if there is none.
        at: The step to continue from; by default that of the newest intact checkpoint.
        ranks: The processes that train; by default this one alone.

    Raises:
        PeerError: One of the following errors occurred on rank 0, which reports it.
        TrainingError: The directory holds a run and ``resume`` was not requested, another process is training in it, or
            its run has another configuration.
        CheckpointError: Every checkpoint is damaged, or that of ``at`` is missing or damaged.
    """

    def __init__(
        self, config: Section, *, resume: bool = False, at: int | None = None, ranks: Ranks | None = None
    ) -> None:
        self.ranks = ranks or Ranks()
        self.config: RunConfig = config.run  # type: ignore[attr-defined]
        self.out = self.config.out
        self.checkpoints = CheckpointStore(self.out / "checkpoints", self.config.keep_checkpoints)
        self._description = config.model_dump(mode="json")
        self._directory: RunDirectory | None = None
        start = self.ranks.on_rank_zero(lambda: self._open(config, resume, at))
        self.finished = start is None
        """Whether every step has been made and ``model/`` has been written."""
        self.start = start or 0
        """The step to continue from."""
        if not self.finished:
            # Adapter initialization, dropout and user-defined rewards draw from the global generators.
            seed_random_state(self.config.seed)

    def train(self, task: Task) -> None:
        """Run the task to its last step, with checkpoints, metrics and a clean stop on SIGTERM and SIGINT.

        Raises:
            Interrupted: A signal was received; the state is saved.
            CheckpointError: A checkpoint cannot be read or written.
            AlignProError: The task failed; the state before the failing step is saved.
        """
        if self.finished:
            return
        self._restore(task)
        with (
            self._log() as log,
            progress_bar(
                self.config.steps, self.start, task.progress_metrics, shown=self.ranks.is_rank_zero
            ) as advance,
            stop_signals(patience=0.0 if self.ranks.group is None else LAUNCHER_PATIENCE) as stop,
        ):
            if self._evaluation_due(self.start) and not self.ranks.on_rank_zero(lambda: log.has_evaluation(self.start)):
                self._evaluate(self.start, task, log)
            for step in range(self.start, self.config.steps):
                with self._saved_on_failure(step, task, log):
                    metrics = task.step(step)
                self._write(log, step + 1, metrics)
                advance(metrics)
                if self._evaluation_due(step + 1):
                    self._evaluate(step + 1, task, log)
                last = step + 1 == self.config.steps
                signum = self.ranks.reduce_max(stop[0] if stop else 0)  # a signal to one rank stops all
                if (step + 1) % self.config.checkpoint_every == 0 or last or signum:
                    self._save(step + 1, task, log)
                if signum and not last:
                    raise Interrupted(signum, self.checkpoints.path(step + 1))
            self._export(task)
        logger.info("the trained model is in %s", self.out / "model")

    def close(self) -> None:
        """Unlock the directory for other processes."""
        if self._directory is not None:
            self._directory.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self, config: Section, resume: bool, at: int | None) -> int | None:
        """Lock the directory and find the step to continue from; None if the run has finished."""
        if self.config.wandb_project:
            import_wandb()
        self._directory = RunDirectory(config, self.out, resume=resume)
        try:
            self.checkpoints.clean()
            if at is None and self._directory.exported_step() == self.config.steps:
                return None
            return self._find_start(self._directory, at)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def _log(self) -> Iterator[MetricsSink]:
        """Open the metrics log, which writes files on rank 0 only."""
        log: MetricsLog | None = None
        with self.ranks.raise_together():
            if self.ranks.is_rank_zero:
                log = MetricsLog(self.config, self.start, self._description)
        if log is None:
            yield NoMetricsLog()
        else:
            with log:
                yield log

    def _write(self, log: MetricsSink, step: int, metrics: Metrics) -> None:
        with self.ranks.raise_together():
            log.write(step, metrics)

    def _evaluation_due(self, step: int) -> bool:
        return self.config.eval_every > 0 and step > 0 and step % self.config.eval_every == 0

    def _evaluate(self, step: int, task: Task, log: MetricsSink) -> None:
        """Log metrics on held-out data; if this fails, a resume from this step's checkpoint evaluates again."""
        with self._saved_on_failure(step, task, log):
            metrics = task.evaluate(step - 1)
        if metrics:
            self._write(log, step, metrics)

    def _save(self, step: int, task: Task, log: MetricsSink, randomness: dict[str, Any] | None = None) -> None:
        """Write a checkpoint: each rank writes its part into a directory that rank 0 creates and renames into place."""

        def part(directory: Path) -> None:
            state = {"step": step, "ranks": self._ranks_launched, "task": task.save(directory)}
            if self.ranks.is_rank_zero:
                (directory / "state.json").write_text(json.dumps(state, indent=1))
            save_torch(random_state() if randomness is None else randomness, directory / self._randomness)

        with self.ranks.raise_together():
            log.sync()
        self.ranks.write_directory(lambda write: self.checkpoints.save(step, write), part)

    @property
    def _randomness(self) -> str:
        """Name of the file with the state of this rank's random generators."""
        return f"random_{self.ranks.rank}.pt" if self.ranks.rank else "random.pt"

    @contextmanager
    def _saved_on_failure(self, step: int, task: Task, log: MetricsSink) -> Iterator[None]:
        """On failure, save the state before the step, unless the failing step may have changed weights."""
        updates, randomness = task.updates, random_state()
        try:
            yield
        except Exception as error:
            if not self.ranks.raised_on_all(error):
                raise  # the other ranks are elsewhere, and saving takes all ranks
            if task.updates == updates and self.ranks.on_rank_zero(lambda: step not in self.checkpoints.available()):
                try:
                    self._save(step, task, log, randomness)
                except PeerError:
                    pass  # the rank that failed reports it
                except AlignProError as unsaved:  # only logged, since the user must see the original failure
                    logger.warning("%s", unsaved)
            if step in self.checkpoints.available():
                logger.warning("the state after step %d is in %s", step, self.checkpoints.path(step))
            if isinstance(error, torch.OutOfMemoryError):
                raise TrainingError(
                    f"out of memory after step {step}: {error}; lower optimizer.micro_batch_size or "
                    "rollout.engine.pool_bytes in a new run, or free the device and --resume"
                ) from error
            raise

    def _find_start(self, directory: RunDirectory, at: int | None) -> int:
        if at is not None:
            self.checkpoints.require(at)
        step = self.checkpoints.latest() if at is None else at
        if step is None and directory.exported_step() is not None:
            raise CheckpointError(f"{self.checkpoints.directory}: no checkpoint, although the run has made its model/")
        if step is not None and step > self.config.steps:
            raise TrainingError(
                f"run directory {self.out}: is at step {step}, beyond run.steps={self.config.steps}; raise run.steps, or "
                "go back with --at"
            )
        return step or 0

    def _restore(self, task: Task) -> None:
        """Load the checkpoint of `start`, and discard everything after it."""
        if self.ranks.on_rank_zero(lambda: self.start in self.checkpoints.available()):
            directory = self.checkpoints.path(self.start)
            try:
                state = json.loads((directory / "state.json").read_text())
                self._check_launcher(directory, state)
                task.load(directory, state["task"])
                if (randomness := directory / self._randomness).is_file():  # absent if this rank did not exist then
                    restore_random_state(torch.load(randomness, weights_only=True))
            except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
                raise CheckpointError(f"checkpoint {directory}: cannot be read: {error}") from error
            logger.info("continuing from %s", directory)
        self.ranks.on_rank_zero(self._discard_later)

    def checkpoint_world_size(self) -> int | None:
        """Number of launched ranks that wrote the checkpoint to continue from; None without a launcher or a checkpoint.

        Raises:
            CheckpointError: The checkpoint cannot be read.
        """

        def read() -> int | None:
            if self.start not in self.checkpoints.available():
                return None
            path = self.checkpoints.path(self.start) / "state.json"
            try:
                ranks: int | None = json.loads(path.read_text())["ranks"]
            except (OSError, ValueError, KeyError) as error:
                raise CheckpointError(f"checkpoint {path}: cannot be read: {error}") from error
            return ranks

        return self.ranks.on_rank_zero(read)

    @property
    def _ranks_launched(self) -> int | None:
        return None if self.ranks.group is None else self.ranks.size

    def _check_launcher(self, directory: Path, state: dict[str, Any]) -> None:
        if (state["ranks"] is None) != (self._ranks_launched is None):
            how = "without a launcher" if state["ranks"] is None else "under the deepspeed launcher"
            raise CheckpointError(f"checkpoint {directory}: was made {how}: resume it the same way")

    def _discard_later(self) -> None:
        """Discard checkpoints and models of steps after `start`."""
        assert self._directory is not None  # on rank 0
        self.checkpoints.discard_after(self.start)
        self._directory.discard_export_after(self.start)

    def _export(self, task: Task) -> None:
        """Write the trained model to ``model/``."""

        def part(directory: Path) -> None:
            task.export(directory)
            if self._directory is not None:
                self._directory.mark_export(directory, self.config.steps)

        def make(write: Callable[[Path], None]) -> None:
            assert self._directory is not None  # on rank 0
            with disk_errors(f"{self._directory.model}", "make room, then --resume"):
                replace_directory(self._directory.model, write)

        self.ranks.write_directory(make, part)
