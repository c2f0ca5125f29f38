"""The run: its directory, and the loop that every training job shares.

A run directory is the only state: ``config.yaml``, ``metrics.jsonl``, ``samples.jsonl``, ``checkpoints/`` and, when the
run has ended, ``model/``. Of several ranks the first writes it; the others add their parts of a checkpoint.
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
from alignpro.distributed.ranks import PeerError, Ranks
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
from alignpro.training.metrics import Metrics, MetricsLog, MetricsSink, NoMetricsLog, import_wandb
from alignpro.training.run_directory import RunDirectory
from alignpro.training.stop_signals import stop_signals

logger = logging.getLogger(__name__)

LAUNCHER_PATIENCE = 25.0
"""Seconds in which signals that come by way of a launcher are one; after 30 the deepspeed launcher kills."""


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
        ranks: The processes that train; this one alone when absent.

    Raises:
        PeerError: One of the following on the first rank, which tells it.
        TrainingError: The directory holds a run and ``resume`` was not asked for, or another process is writing to it,
            or the configuration is not that of the run.
        CheckpointError: There are checkpoints and every one is damaged, or that of ``at`` is.
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
        start = self.ranks.on_first(lambda: self._open(config, resume, at))
        self.finished = start is None
        """Whether every step has been made and ``model/`` is in place."""
        self.start = start or 0
        """The step to go on from."""
        if not self.finished:
            # For what draws from the global generators: an adapter's first weights, dropout, a reward of the user.
            seed_random_state(self.config.seed)

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
            self._log() as log,
            progress_bar(self.config.steps, self.start, task.headline, shown=self.ranks.first) as advance,
            stop_signals(patience=0.0 if self.ranks.group is None else LAUNCHER_PATIENCE) as stop,
        ):
            if self._evaluation_due(self.start) and not self.ranks.on_first(lambda: log.has_evaluation(self.start)):
                self._evaluate(self.start, task, log)
            for step in range(self.start, self.config.steps):
                with self._saved_on_failure(step, task, log):
                    metrics = task.step(step)
                self._write(log, step + 1, metrics)
                advance(metrics)
                if self._evaluation_due(step + 1):
                    self._evaluate(step + 1, task, log)
                last = step + 1 == self.config.steps
                signum = self.ranks.most(stop[0] if stop else 0)  # a signal to one rank stops all
                if (step + 1) % self.config.checkpoint_every == 0 or last or signum:
                    self._save(step + 1, task, log)
                if signum and not last:
                    raise Interrupted(signum, self.checkpoints.path(step + 1))
            self._export(task)
        logger.info("the trained model is in %s", self.out / "model")

    def close(self) -> None:
        """Let other processes use the directory."""
        if self._directory is not None:
            self._directory.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self, config: Section, resume: bool, at: int | None) -> int | None:
        """Take the directory and find the step to go on from; None where nothing is left to do."""
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
        """Where metrics go: to files, on the first rank."""
        log: MetricsLog | None = None
        with self.ranks.together():
            if self.ranks.first:
                log = MetricsLog(self.config, self.start, self._description)
        if log is None:
            yield NoMetricsLog()
        else:
            with log:
                yield log

    def _write(self, log: MetricsSink, step: int, metrics: Metrics) -> None:
        with self.ranks.together():
            log.write(step, metrics)

    def _evaluation_due(self, step: int) -> bool:
        return self.config.eval_every > 0 and step > 0 and step % self.config.eval_every == 0

    def _evaluate(self, step: int, task: Task, log: MetricsSink) -> None:
        """Log metrics on held-out data; a resume from a checkpoint of this step makes up for a failure here."""
        with self._saved_on_failure(step, task, log):
            metrics = task.evaluate(step - 1)
        if metrics:
            self._write(log, step, metrics)

    def _save(self, step: int, task: Task, log: MetricsSink, randomness: dict[str, Any] | None = None) -> None:
        """Write a checkpoint: each rank its part, into a directory that the first one makes and puts in place."""

        def part(directory: Path) -> None:
            state = {"step": step, "ranks": self._ranks_launched, "task": task.save(directory)}
            if self.ranks.first:
                (directory / "state.json").write_text(json.dumps(state, indent=1))
            save_torch(random_state() if randomness is None else randomness, directory / self._randomness)

        with self.ranks.together():
            log.sync()
        self.ranks.fill(lambda write: self.checkpoints.save(step, write), part)

    @property
    def _randomness(self) -> str:
        """The file that holds this rank's state of the random generators."""
        return f"random_{self.ranks.rank}.pt" if self.ranks.rank else "random.pt"

    @contextmanager
    def _saved_on_failure(self, step: int, task: Task, log: MetricsSink) -> Iterator[None]:
        """Keep what was reached before a failure, unless the failing step may have changed weights by then."""
        updates, randomness = task.updates, random_state()
        try:
            yield
        except Exception as error:
            if not self.ranks.agreed_on(error):
                raise  # the other ranks are elsewhere: what there is to save, they cannot help to
            if task.updates == updates and self.ranks.on_first(lambda: step not in self.checkpoints.available()):
                try:
                    self._save(step, task, log, randomness)
                except PeerError:
                    pass  # the first rank tells it
                except AlignProError as unsaved:  # told beside the failure itself, which the user must see
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
        """Take up the checkpoint of `start`, and drop what came after it."""
        if self.ranks.on_first(lambda: self.start in self.checkpoints.available()):
            directory = self.checkpoints.path(self.start)
            try:
                state = json.loads((directory / "state.json").read_text())
                self._check_launcher(directory, state)
                task.load(directory, state["task"])
                if (randomness := directory / self._randomness).is_file():  # not that of a rank that there was not
                    restore_random_state(torch.load(randomness, weights_only=True))
            except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
                raise CheckpointError(f"checkpoint {directory}: cannot be read: {error}") from error
            logger.info("continuing from %s", directory)
        self.ranks.on_first(self._discard_later)

    def saved_ranks(self) -> int | None:
        """How many ranks a launcher had started when the checkpoint was made that the run goes on from; None without one.

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

        return self.ranks.on_first(read)

    @property
    def _ranks_launched(self) -> int | None:
        return None if self.ranks.group is None else self.ranks.size

    def _check_launcher(self, directory: Path, state: dict[str, Any]) -> None:
        if (state["ranks"] is None) != (self._ranks_launched is None):
            how = "without a launcher" if state["ranks"] is None else "under the deepspeed launcher"
            raise CheckpointError(f"checkpoint {directory}: was made {how}: start --resume so too")

    def _discard_later(self) -> None:
        """Drop what came after `start`."""
        assert self._directory is not None  # that of the first rank
        self.checkpoints.discard_after(self.start)
        self._directory.discard_export_after(self.start)

    def _export(self, task: Task) -> None:
        """Put the trained model in place."""

        def part(directory: Path) -> None:
            task.export(directory)
            if self._directory is not None:
                self._directory.mark_export(directory, self.config.steps)

        def make(write: Callable[[Path], None]) -> None:
            assert self._directory is not None  # that of the first rank
            with disk_errors(f"{self._directory.model}", "make room, then --resume"):
                replace_directory(self._directory.model, write)

        self.ranks.fill(make, part)
