"""Updates of the policy whose KL to the policy that drew the rollout is measured and limited; see `objectives.step_size`.

KL(ρ_new ‖ ρ_old) is exact at each state, over the whole vocabulary, and its sum over a sequence is averaged over one sample of
each prompt, since a step does to the samples of a prompt nearly the same, and to prompts very different things. The old
policy's hidden states are those of the pass that computed the advantages, so the measurement costs one forward pass over a
sample of each prompt; where the output layer is trained, a copy of it is kept until the end of the step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignpro.config import ObjectiveConfig, OptimizerConfig
from alignpro.distributed.ranks import Ranks
from alignpro.models.head import Head
from alignpro.models.sequences import SequenceBatch
from alignpro.objectives import StepSize
from alignpro.policy.policy import Policy
from alignpro.training.backend import Backend
from alignpro.training.experience import Experience
from alignpro.training.gradient_accumulation import GradientAccumulation
from alignpro.training.metrics import Metrics

logger = logging.getLogger(__name__)

_ATTEMPTS = 8
"""Number of times that an update is shortened, the last time to nothing."""


@dataclass(frozen=True)
class Before:
    """The policy before the step's first update."""

    parts: Sequence[SequenceBatch]
    """Micro-batches of the sequences that are measured."""
    states: Sequence[Tensor]
    """(N, D) of each."""
    head: Head | None
    """Its output layer, if that is trained."""
    count: float
    """Number of sequences of all ranks."""


class LimitedUpdates:
    """Makes the updates of a step; every method is a collective.

    Args:
        policy: The policy.
        backend: Trains it.
        accumulate: Divides sequences into passes.
        objective: ``step_kl`` is the limit; None makes updates without measuring them.
        optimizer: The learning rate, which is the highest.
        ranks: All ranks.
    """

    def __init__(
        self,
        policy: Policy,
        backend: Backend,
        accumulate: GradientAccumulation,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig,
        ranks: Ranks,
    ) -> None:
        self._policy, self._backend, self._passes, self._ranks = policy, backend, accumulate.passes, ranks
        self._size = None if objective.step_kl is None else StepSize(objective.step_kl)
        self._highest_rate = optimizer.learning_rate
        self._before: Before | None = None
        self._metrics: Metrics = {}
        self._made, self._of = 0, 1
        self._stopped = False
        self._reached = 1.0, 0.0, 1.0  # factor, KL and share of the learning rate, from which the next factor follows
        if self._size is not None and not backend.can_shorten and ranks.is_rank_zero:
            logger.warning(
                "objective.step_kl: updates cannot be shortened at once, since DeepSpeed swaps their state to a disk; only "
                "the learning rate of the next one follows the KL"
            )

    def begin(self, experience: Experience, step: int, groups: Sequence[int], size: int, updates: int) -> None:
        """Begin a step's updates: keep what the policy is now, at some of its samples.

        Args:
            experience: The rollout of this rank's groups.
            step: The number of the step.
            groups: The indices of these groups among those of the step.
            size: Samples per group.
            updates: Number of updates of the step.
        """
        if self._size is None:
            return
        self._made, self._of, self._stopped = 0, updates, False
        # Whichever rank has a group, the same sample of it is measured.
        samples = [place * size + (group + step) % size for place, group in enumerate(groups)]
        rows = torch.tensor(samples, dtype=torch.int64, device=experience.scores.device)
        batch = experience.batch.select(rows) if len(rows) else None
        parts = self._passes(batch)
        states = experience.values.policy_states
        # (N, D) of the measured sequences; the passes that only keep ranks in step have none
        states = states[experience.state_index[rows][experience.batch.mask[rows]]]
        self._metrics = {}
        self._before = Before(
            parts,
            states.split([len(part.targets) for part in parts]),
            self._policy.copy_head(states),
            max(self._ranks.sum(len(rows)), 1.0),
        )

    def __call__(self) -> float:
        """Update the weights with the accumulated gradients, and shorten the update while it goes too far.

        Returns:
            The gradient's norm, as the backend does.
        """
        if self._size is None or self._before is None:
            return self._backend.step()
        share = self._backend.learning_rate / self._highest_rate
        factor = applied = self._size.factor
        norm = self._backend.step(applied)
        if not math.isfinite(norm):
            return norm  # the update was skipped
        kl = at_first = self._measure(self._before)
        self._made += 1
        self._stopped = self._size.too_far(kl, share)
        attempts = 0
        while applied and self._backend.can_shorten and self._size.too_far(kl, share):
            attempts += 1
            factor = self._size.shortened(factor, kl, share)
            applied = factor if attempts < _ATTEMPTS else 0.0
            self._backend.shorten(applied)
            kl = self._measure(self._before)
        # What shortens an update after others is where they have led, which says nothing about its own length.
        self._reached = (factor, kl, share) if self._made == 1 else (self._size.factor, at_first, share)
        self._metrics = {"kl_step": kl, "learning_rate_factor": applied}
        return norm

    @property
    def exhausted(self) -> bool:
        """Whether the step makes no more updates, since the policy has gone as far as it may."""
        if self._size is None or not self._made:
            return False
        share = self._backend.learning_rate / self._highest_rate
        self._stopped = self._stopped or self._size.too_far(self._metrics["kl_step"], share)
        return self._stopped

    def end(self) -> Metrics:
        """End the step's updates.

        Returns:
            ``kl_step`` is the KL of the policy to that before the step, in nats per sequence; ``learning_rate_factor``
            that of its last update.
        """
        if self._size is not None and self._metrics:
            self._size.adapt(*self._reached, self._made / self._of if self._stopped else 1.0)
        self._before = None
        return self._metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the state to checkpoint."""
        return {} if self._size is None else {"step_size": self._size.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Runs of earlier versions saved nothing, and go on without a limit as before."""
        if "step_size" not in state:
            self._size = None
        elif self._size is not None:
            self._size.load_state_dict(state["step_size"])

    def _measure(self, before: Before) -> float:
        """KL(ρ_new ‖ ρ_old) in nats per sequence."""
        parts = zip(before.parts, before.states, strict=True)
        total = sum(self._policy.kl_from(part, states, before.head).sum().item() for part, states in parts)
        return self._ranks.sum(total) / before.count
