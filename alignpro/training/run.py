"""The run: its directory, and the training loop that all jobs share.

A run directory holds all state: ``config.yaml``, ``metrics.jsonl``, ``samples.jsonl``, ``checkpoints/`` and, once the run
has finished, ``model/``. Rank 0 writes it; the other ranks only add their parts of a checkpoint.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from alignpro.config import RunConfig, RunSection
from alignpro.distributed.ranks import Ranks
from alignpro.errors import AlignProError, CheckpointError, Interrupted, PeerError, TrainingError
from alignpro.models.saving import name_base
from alignpro.training.checkpoint import CheckpointStore, save_torch
from alignpro.training.durability import disk_errors, replace_directory
from alignpro.training.loggers.jsonl import read_rows
from alignpro.training.loggers.metrics_logger import MetricsLogger
from alignpro.training.loggers.wandb import import_wandb
from alignpro.training.metrics import Evaluation, Metrics
from alignpro.training.progress import progress_bar
from alignpro.training.resume import check_launcher, find_start
from alignpro.training.rng_state import get_rng_state, preserved_rng_state, seed_all, set_rng_state
from alignpro.training.run_directory import RUN_ID, RunDirectory
from alignpro.training.runaway import RunawayWatch
from alignpro.training.selection import Selection
from alignpro.training.stop_signals import stop_signals
from alignpro.training.trained_card import describe_training

logger = logging.getLogger(__name__)

LAUNCHER_PATIENCE = 25.0
"""Seconds in which repeated signals to launched ranks count as one; the deepspeed launcher kills its ranks after 30."""


class Trainer(Protocol):
    """What a run trains: the step that it repeats, and the state that it saves."""

    @property
    def progress_metrics(self) -> Sequence[str]:
        """Names of the metrics that the progress bar shows."""

    @property
    def updates(self) -> int:
        """Optimizer steps begun so far; a failed step that has not increased it has not changed the weights."""

    def step(self, step: int) -> Metrics:
        """Make training step ``step`` (counted from 0)."""

    def evaluate(self, step: int) -> Evaluation:
        """Evaluate on held-out data after step ``step``."""

    def save(self, directory: Path) -> dict[str, Any]:
        """Write weights and optimizers into a directory; returns the rest of the state, serializable as JSON."""

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """Restore the state that `save` wrote."""

    def export(self, directory: Path) -> None:
        """Write the trained model in the format of ``from_pretrained``."""


class Run:
    """A run directory that is open for training; a context manager, because it locks other processes out.

    The constructor checks everything that it can before the models are loaded, and seeds the global random generators
    with the run's seed. A run that has been closed can still be read, and stands for its directory as a path.

    Args:
        config: The job's whole configuration.
        resume: Continue the run in the directory; start one if there is none.
        from_step: The step to continue from; by default that of the newest intact checkpoint.
        ranks: The processes that train; by default this one alone.

    Raises:
        PeerError: One of the following errors occurred on rank 0, which reports it.
        TrainingError: The directory holds a run and ``resume`` was not requested, another process is training in it, or
            its run has another configuration.
        CheckpointError: Every checkpoint is damaged, or that of ``from_step`` is missing or damaged.
    """

    def __init__(
        self, config: RunSection, *, resume: bool = False, from_step: int | None = None, ranks: Ranks | None = None
    ) -> None:
        self.ranks = ranks or Ranks()
        self.config: RunConfig = config.run
        self.out = self.config.out
        self.checkpoints = CheckpointStore(self.out / "checkpoints", self.config.keep_checkpoints, self.out / RUN_ID)
        self._description = config.model_dump(mode="json")
        self._directory: RunDirectory | None = None
        self._selection = Selection(config.selects_best)
        start = self.ranks.on_rank_zero(lambda: self._open(config, resume, from_step))
        self.finished = start is None
        """Whether every step has been made and ``model/`` has been written."""
        self.start_step = start or 0
        """The step to continue from."""
        if self.finished:
            logger.info("the run in %s has finished: its model is in %s", self.out, self.out / "model")
        else:
            # Adapter initialization, dropout and user-defined rewards draw from the global generators.
            seed_all(self.config.seed)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: one per step, and one more per evaluation."""
        return read_rows(self.out / "metrics.jsonl")

    def __fspath__(self) -> str:
        return str(self.out)

    def train(self, trainer: Trainer) -> None:
        """Train to the last step, with checkpoints, metrics and a clean stop on SIGTERM and SIGINT.

        Raises:
            Interrupted: A signal was received; the state is saved.
            CheckpointError: A checkpoint cannot be read or written.
            AlignProError: A step failed; the state before it is saved.
        """
        if self.finished:
            return
        self._restore(trainer)
        progress = progress_bar(
            self.config.steps, self.start_step, trainer.progress_metrics, shown=self.ranks.is_rank_zero
        )
        watch = RunawayWatch()
        stopping = stop_signals(patience=0.0 if self.ranks.group is None else LAUNCHER_PATIENCE)
        with self._open_log() as log, progress as advance, stopping as stop:
            if self._evaluation_due(self.start_step) and not self._has_evaluated(self.start_step, log):
                self._evaluate(self.start_step, trainer, log)
                if self._selection.active:
                    self._save(self.start_step, trainer, log)  # again, with the selection
            for step in range(self.start_step, self.config.steps):
                with self._saved_on_failure(step, trainer, log):
                    metrics = trainer.step(step)
                self._write(log, step + 1, metrics)
                warnings = watch(metrics)
                advance(metrics, watch.notes)
                for warning in warnings if self.ranks.is_rank_zero else ():
                    logger.warning("step %d: %s", step + 1, warning)
                if self._evaluation_due(step + 1):
                    self._evaluate(step + 1, trainer, log)
                best = self._selection.best_step == step + 1
                last = step + 1 == self.config.steps
                signum = self.ranks.reduce_max(stop[0] if stop else 0)  # a signal to one rank stops all
                if (step + 1) % self.config.checkpoint_every == 0 or last or best or signum:
                    self._save(step + 1, trainer, log)
                if signum and not last:
                    raise Interrupted(signum, self.checkpoints.path(step + 1))
            self._export(trainer)
        logger.info("the trained model is in %s", self.out / "model")

    def record(self, config: RunSection) -> None:
        """Record what was chosen for the run after its directory had been opened; a collective.

        Raises:
            TrainingError: The directory cannot be written.
        """

        def write() -> None:
            assert self._directory is not None  # on rank 0
            self._directory.record(config)

        self._description = config.model_dump(mode="json")
        self.ranks.on_rank_zero(write)

    def close(self) -> None:
        """Unlock the directory for other processes."""
        if self._directory is not None:
            self._directory.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self, config: RunSection, resume: bool, from_step: int | None) -> int | None:
        """Lock the directory and find the step to continue from; None if the run has finished."""
        if self.config.wandb_project:
            import_wandb()
        self._directory = RunDirectory(config, resume=resume)
        try:
            self.checkpoints.remove_partial()
            start = find_start(self.config, self.checkpoints, self._directory.exported_step(), from_step)
            if resume and start == 0:
                logger.info("%s has no checkpoint: starting from the first step", self.out)
            return start
        except BaseException:
            self.close()
            raise

    @contextmanager
    def _open_log(self) -> Iterator[MetricsLogger | None]:
        """Open the metrics log, which only rank 0 writes."""
        log: MetricsLogger | None = None
        with self.ranks.raise_together():
            if self.ranks.is_rank_zero:
                log = MetricsLogger(self.config, self.start_step, self._description)
        with log or nullcontext():
            yield log

    def _write(self, log: MetricsLogger | None, step: int, metrics: Mapping[str, float]) -> None:
        with self.ranks.raise_together():
            if log:
                log.write(step, metrics)

    def _evaluation_due(self, step: int) -> bool:
        every, last = self.config.eval_every, self._selection.active and step == self.config.steps
        return every > 0 and step > 0 and (step % every == 0 or last)

    def _has_evaluated(self, step: int, log: MetricsLogger | None) -> bool:
        """Whether a step's evaluation is in metrics.jsonl and, if a checkpoint is selected, counted in that; a collective."""
        if self._selection.active and (self._selection.last is None or self._selection.last.step != step):
            return False
        return self.ranks.on_rank_zero(lambda: log is not None and log.has_evaluation(step))

    def _evaluate(self, step: int, trainer: Trainer, log: MetricsLogger | None) -> None:
        """Log metrics on held-out data; if this fails, a resume from this step's checkpoint evaluates again.

        Training draws the same random numbers as if there were no evaluation.
        """
        with self._saved_on_failure(step, trainer, log), preserved_rng_state():
            evaluation = trainer.evaluate(step - 1)
        with self.ranks.raise_together():
            if log and evaluation.metrics and not log.has_evaluation(step):
                log.write(step, evaluation.metrics)
        self._selection.add(step, evaluation.objective)

    def _save(
        self, step: int, trainer: Trainer, log: MetricsLogger | None, rng_state: dict[str, Any] | None = None
    ) -> None:
        """Write a checkpoint: each rank writes its part into a directory that rank 0 creates and renames into place."""

        def write_part(directory: Path) -> None:
            with self.checkpoints.write_errors(step):  # on the rank that it happens to, which reports it
                state = {"step": step, "ranks": self._ranks_launched, "task": trainer.save(directory)}
                state["selection"] = self._selection.state_dict()
                if self.ranks.is_rank_zero:
                    (directory / "state.json").write_text(json.dumps(state, indent=1))
                save_torch(get_rng_state() if rng_state is None else rng_state, directory / self._rng_file)

        with self.ranks.raise_together():
            if log:
                log.fsync()
        self.ranks.write_directory(
            lambda write: self.checkpoints.save(step, write, self._selection.best_step), write_part
        )

    @property
    def _rng_file(self) -> str:
        """Name of the file with the state of this rank's random generators."""
        return f"random_{self.ranks.rank}.pt" if self.ranks.rank else "random.pt"

    @property
    def _ranks_launched(self) -> int | None:
        return None if self.ranks.group is None else self.ranks.size

    @contextmanager
    def _saved_on_failure(self, step: int, trainer: Trainer, log: MetricsLogger | None) -> Iterator[None]:
        """On failure, save the state before the step, unless the failing step may have changed weights."""
        updates, rng_state = trainer.updates, get_rng_state()
        try:
            yield
        except Exception as error:
            if not self.ranks.raised_on_all(error):
                raise  # the other ranks are elsewhere, and saving takes all ranks
            if trainer.updates == updates and self.ranks.on_rank_zero(lambda: step not in self.checkpoints.available()):
                try:
                    self._save(step, trainer, log, rng_state)
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

    def _restore(self, trainer: Trainer) -> None:
        """Load the checkpoint of `start_step`, and remove everything after it."""
        if self.ranks.on_rank_zero(lambda: self.start_step in self.checkpoints.available()):
            with _read_errors(self.checkpoints.path(self.start_step)) as directory:
                state = _read_state(directory)
                check_launcher(directory, state["ranks"], self._ranks_launched)
                trainer.load(directory, state["task"])
                self._selection.load_state_dict(state.get("selection", {}))
                if (rng_file := directory / self._rng_file).is_file():  # absent if this rank did not exist then
                    set_rng_state(torch.load(rng_file, weights_only=True))
            logger.info("continuing from %s", directory)
        self.ranks.on_rank_zero(self._remove_later)
        best = self._selection.best_step
        if best is None or best == self.start_step:
            return
        if problem := self.ranks.on_rank_zero(lambda: self.checkpoints.damage(best)):
            path = self.checkpoints.path(best)
            logger.warning("%s, the best so far, cannot be used (%s): a later one is selected", path, problem)
            self._selection.reset()

    def _remove_later(self) -> None:
        """Remove checkpoints and models of steps after `start_step`."""
        assert self._directory is not None  # on rank 0
        self.checkpoints.remove_after(self.start_step)
        self._directory.remove_export_after(self.start_step)

    def _load_selected(self, trainer: Trainer) -> None:
        """Load the weights of the selected checkpoint, unless they are those of the last step."""
        step = self._selection.selected_step
        if step is None:
            return
        if step != self.config.steps:
            remedy = "continue with --resume, which selects another"
            self.ranks.on_rank_zero(lambda: self.checkpoints.require(step, remedy))
            with _read_errors(self.checkpoints.path(step)) as directory:
                trainer.load(directory, _read_state(directory)["task"])
        logger.info("run.select=best: %s", self._selection)

    def _export(self, trainer: Trainer) -> None:
        """Write the trained model to ``model/``."""
        self._load_selected(trainer)

        def write_part(directory: Path) -> None:
            trainer.export(directory)
            if self._directory is not None:
                name_base(directory, self._directory.model)
                describe_training(directory, self._directory.path)
                self._directory.mark_export(directory, self.config.steps, self._selection.record())

        def replace(write: Callable[[Path], None]) -> None:
            assert self._directory is not None  # on rank 0
            with disk_errors(f"{self._directory.model}", "make room, then --resume"):
                replace_directory(self._directory.model, write)

        self.ranks.write_directory(replace, write_part)


def _read_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    return state


@contextmanager
def _read_errors(checkpoint: Path) -> Iterator[Path]:
    """Turn a failure to read a checkpoint into a `CheckpointError` that names its directory."""
    try:
        yield checkpoint
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"checkpoint {checkpoint}: cannot be read: {error}") from error
