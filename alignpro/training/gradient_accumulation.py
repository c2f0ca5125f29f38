"""The gradient of a minibatch: one micro-batch at a time, with as many passes as every other rank makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from alignpro import objectives
from alignpro.config import ObjectiveConfig
from alignpro.distributed.ranks import Ranks
from alignpro.models.sequences import SequenceBatch
from alignpro.policy.policy import Policy
from alignpro.training.backend import Backend
from alignpro.training.critic import Critic
from alignpro.training.experience import Experience, no_actions
from alignpro.training.metrics import Metrics, weighted_mean
from alignpro_kernels import Coefficients


@dataclass(frozen=True)
class MicroBatchPasses:
    """The policy's passes over a micro-batch; see `alignpro.objectives.Passes`."""

    policy: Policy
    batch: SequenceBatch
    states: Tensor | None
    """(N, D) of the policy, if they have been computed already."""
    reference_states: Callable[[], Tensor | None]
    """Returns those of the reference, (N, D), if the exact KL is part of the loss."""
    entropy: bool

    def token_loss(self, coefficients: Coefficients) -> Tensor:
        """Sum a loss of single tokens over all actions."""
        return self.policy.loss(
            self.batch,
            coefficients,
            states=self.states,
            reference_states=self.reference_states(),
            entropy=self.entropy,
        ).loss

    def sequence_logprob(self) -> Tensor:
        """Compute log ρ(x'|x), (B,)."""
        return self.policy.sequence_logprob(self.batch)


class GradientAccumulation:
    """Adds the gradients of policy and critic over a minibatch.

    Args:
        policy: The policy.
        loss: Its loss.
        backend: Trains it.
        critic: The critic, if the advantage needs one.
        objective: Coefficients of the loss.
        group: K, the samples per prompt.
        micro_batch_size: Sequences per pass.
        ranks: All ranks.
    """

    def __init__(
        self,
        policy: Policy,
        loss: objectives.Loss,
        backend: Backend,
        critic: Critic | None,
        objective: ObjectiveConfig,
        group: int,
        micro_batch_size: int,
        ranks: Ranks,
    ) -> None:
        self.policy, self.loss, self.backend, self.critic = policy, loss, backend, critic
        self.objective, self.group, self.ranks = objective, group, ranks
        # A group's prompt is computed once per micro-batch. A loss that compares a group's samples needs them all.
        whole = micro_batch_size >= group or (loss.needs_group and not loss.splits_groups)
        self.micro_batch_size = max(1, micro_batch_size // group) * group if whole else micro_batch_size

    def micro_batches(self, rows: int) -> Iterator[tuple[int, int]]:
        """Yield row ranges (start, stop) of at most ``micro_batch_size`` rows, made of whole groups if these fit."""
        for start in range(0, rows, self.micro_batch_size):
            yield start, min(start + self.micro_batch_size, rows)

    def passes(self, batch: SequenceBatch | None) -> list[SequenceBatch]:
        """Split a batch into micro-batches, followed by ones without actions until all ranks have the same number.

        Args:
            batch: This rank's sequences; None if it has none.
        """
        parts = [batch.rows(*rows) for rows in self.micro_batches(len(batch))] if batch is not None else []
        return self.ranks.lockstep(parts, no_actions(1, self.policy.model.device, self.policy.model.invocation))

    def __call__(self, minibatch: Experience, kl: objectives.KLPenalty, states: Tensor | None = None) -> Metrics:
        """Add the gradients of a minibatch, and return the loss and means over its tokens.

        Args:
            minibatch: This rank's part of the minibatch.
            kl: The KL penalty, with the λ of this step.
            states: (N, D) hidden states of all its actions, if they have been computed already.
        """
        total = 0.0
        details: list[Metrics] = []
        tokens: list[int] = []
        scale = 1.0 / max(self.ranks.sum(objectives.loss_count(minibatch.batch.mask, self.objective.normalize_by)), 1.0)
        rows_of_all = self.ranks.sum(len(minibatch.batch))
        parts = [(minibatch, start, stop) for start, stop in self.micro_batches(len(minibatch.batch))]
        nothing = minibatch.without_actions(self.group, self.policy.model.invocation)
        for part, start, stop in self.ranks.lockstep(parts, (nothing, 0, self.group)):
            batch, rows = part.batch.rows(start, stop), slice(start, stop)
            inputs = objectives.LossInputs(
                mask=part.batch.mask[rows],
                advantages=part.advantages[rows],
                reference_logprob=part.values.reference_logprob[rows],
                old_logprob=part.values.logprob[rows],
                scores=part.scores[rows],
                group=self.group,
                scale=scale,
                share=(stop - start) / rows_of_all,
                kl_coef=kl.coef,
                kl_estimator=kl.estimator,
                entropy_coef=self.objective.entropy_coef,
                sampled_share=kl.sampled_share,
                weights=None if part.weights is None else part.weights[rows],
            )
            reference = partial(self._reference_states, part, rows, kl)
            output = self.loss(
                inputs, MicroBatchPasses(self.policy, batch, states, reference, self.objective.entropy_coef > 0)
            )
            if output.tokens:
                details.append(output.metrics)
                tokens.append(output.tokens)
            self.backend.backward(output.loss)
            total += output.loss.item()
            if self.critic is not None and part.value_targets is not None:
                targets = part.value_targets[start:stop, : batch.mask.shape[1]]
                self.critic.backward(batch, targets, scale * self.objective.value_coef)
        return {"loss": self.ranks.sum(total), **self.ranks.mean(weighted_mean(details, tokens), sum(tokens))}

    def _reference_states(self, part: Experience, rows: slice, kl: objectives.KLPenalty) -> Tensor | None:
        if not self.loss.reads_kl or objectives.exact_kl_coef(kl.estimator, kl.coef, kl.sampled_share) == 0:
            return None
        return part.values.reference_states[part.state_index[rows][part.batch.mask[rows]]]


def split_minibatches(groups: int, count: int, seed: int) -> list[Tensor]:
    """Split the indices of groups evenly into minibatches; shuffled unless there is only one.

    Args:
        groups: The number of groups of all ranks.
        count: The number of minibatches.
        seed: Seed of the shuffle.
    """
    order = torch.arange(groups)
    if count > 1:
        order = torch.randperm(groups, generator=torch.Generator().manual_seed(seed))
    return list(order.tensor_split(count))
