"""The order of a run's training data: a function of (seed, step), so that a resumed run sees the same order."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch

from alignpro.data import Prompt
from alignpro.distributed.ranks import Ranks
from alignpro.engine import derive_seed
from alignpro.errors import DataError

logger = logging.getLogger(__name__)


class PromptStream:
    """Endless batches over shuffled epochs.

    Args:
        prompts: Prompts to draw from; each is seen once per epoch.
        batch_size: Prompts per step.
        seed: Seed of the shuffles.

    Raises:
        DataError: There are no prompts.
    """

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, seed: int) -> None:
        if not prompts:
            raise DataError(
                "no prompt to train on: every row was filtered out or held out; check data.source and data.holdout"
            )
        if batch_size > len(prompts):
            logger.warning(
                "a step takes %d prompts and there are %d: some occur more than once per step", batch_size, len(prompts)
            )
        self.prompts = prompts
        self.batch_size = batch_size
        self.seed = seed
        self._order = lru_cache(maxsize=2)(self._shuffle)  # a batch spans at most two epochs, except for tiny data

    def batch(self, step: int) -> list[Prompt]:
        """Return the prompts of a step (counted from 0)."""
        first = step * self.batch_size
        places = (divmod(i, len(self.prompts)) for i in range(first, first + self.batch_size))
        return [self.prompts[self._order(epoch)[i]] for epoch, i in places]

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the prompts: all their fields and their order, but not their location."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            texts = [prompt.id, prompt.rewrite, prompt.response, prompt.chosen, prompt.rejected]
            row = json.dumps([*texts, dict(prompt.metadata)], sort_keys=True, default=repr)
            digest.update(row.encode())
        return digest.hexdigest()[:16]

    def check_ranks(self, ranks: Ranks) -> None:
        """Check that all ranks have the same prompts; a collective.

        Raises:
            DataError: A rank has different prompts.
        """
        ranks.require_equal(
            self.fingerprint,
            lambda rank, *_: DataError(
                f"rank {rank} has other training data than rank 0: give every node the same files (data.source) and the "
                "same configuration"
            ),
        )

    def _shuffle(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
        return torch.randperm(len(self.prompts), generator=generator).tolist()
