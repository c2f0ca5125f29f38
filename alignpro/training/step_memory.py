"""What a run remembers: the rewrites of its steps with their rewards, equal on all ranks.

A step's rewrites see the memory of the steps before: it changes once a step, when the step has been made. Only training
steps add to it, so that it holds no prompt on which the run evaluates itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignpro.data import Prompt
from alignpro.distributed.ranks import Ranks
from alignpro.environments.base import Scores
from alignpro.errors import CheckpointError
from alignpro.prompting.memory import FILE_NAME, Memory, read_memory
from alignpro.prompting.memory_context import MemoryContext
from alignpro.training.durability import replace_file
from alignpro.training.loggers.jsonl import log_errors
from alignpro.training.metrics import Metrics


class StepMemory:
    """The memory of a run; every method but `save` is a collective.

    Args:
        ranks: All ranks.
        context: The memory, as the environment shows it.
        out: The run directory, in which rank 0 keeps the memory of the last step.
    """

    def __init__(self, ranks: Ranks, context: MemoryContext, out: Path) -> None:
        self._ranks, self._context, self._out = ranks, context, out

    @property
    def memory(self) -> Memory:
        """The past rewrites."""
        return self._context.memory

    def add(
        self, step: int, batch: Sequence[Prompt], local: Sequence[int], prompts: Sequence[Prompt], scores: Scores
    ) -> Metrics:
        """Add the rewrites of a step, in the order of its prompts, whichever ranks sampled them.

        Args:
            step: The step, counted from 0.
            batch: Its prompts of all ranks.
            local: The places of this rank's among them.
            prompts: This rank's.
            scores: Theirs.

        Returns:
            The number of prompts and of rewrites in the memory, and the mean number of past rewrites that a prompt of the step
            has seen.

        Raises:
            TrainingError: The memory cannot be written.
        """
        seen = sum(self._context.shown(prompt) for prompt in prompts) / max(len(prompts), 1)
        shown = self._ranks.mean({"memory/shown": seen}, len(prompts))
        own = dict(zip(local, zip(scores.samples, scores.values.tolist(), strict=True), strict=True))
        found = {place: each for part in self._ranks.all_gather_object(own) for place, each in part.items()}
        samples, values = zip(*(found[place] for place in range(len(batch))), strict=True)
        self.memory.add(step + 1, batch, samples, values)
        self._write()
        return {
            "memory/prompts": float(len(self.memory)),
            "memory/rewrites": float(len(self.memory.rewrites)),
            **shown,
        }

    def save(self, directory: Path) -> None:
        """Write the memory into a checkpoint, from one rank."""
        if self._ranks.is_rank_zero:
            (directory / FILE_NAME).write_bytes(self.memory.dumps())

    def load(self, directory: Path) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: There is no memory, or its template has changed.
        """
        with self._ranks.raise_together():
            saved = read_memory(directory)
            if saved is None:
                raise CheckpointError(f"checkpoint {directory}: has no {FILE_NAME}: start a new run in another run.out")
            if saved.template.version != self.memory.template.version:
                raise CheckpointError(
                    f"checkpoint {directory}: memory.template is not what this run started with: restore it, or start a new "
                    "run in another run.out"
                )
            self.memory.restore(saved)
        self._write()

    def _write(self) -> None:
        path = self._out / FILE_NAME
        with self._ranks.raise_together(), log_errors(path):
            if self._ranks.is_rank_zero:
                replace_file(path, lambda temporary: temporary.write_bytes(self.memory.dumps()))
