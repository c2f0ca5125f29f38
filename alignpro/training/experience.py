"""A rollout with all that the update needs: joined from micro-batches, cut into minibatches, filled up with nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignpro.policy import TokenValues
from alignpro.sequences import SequenceBatch


@dataclass(frozen=True)
class Experience:
    """A rollout with all that the update needs; B = P·K rows, prompt-major, of T actions at most."""

    batch: SequenceBatch
    scores: Tensor
    """(B,) R."""
    values: TokenValues
    """Of the policy that sampled."""
    state_index: Tensor
    """(B, T) int64: the row of ``values.reference_states`` that belongs to an action."""
    returns: Tensor
    """(B, T) G_t: the score less the KL still to come (or so far as the estimator puts it in the reward)."""
    advantages: Tensor
    """(B, T)."""
    value_targets: Tensor | None
    """(B, T), for the critic."""

    def select(self, groups: Tensor, size: int) -> Experience:
        """The rows of some groups of ``size``; the reference's states stay whole, since ``state_index`` points into them."""
        rows = (groups[:, None] * size + torch.arange(size)).flatten().to(self.scores.device)
        values, targets = self.values, self.value_targets
        return Experience(
            batch=self.batch.select(rows),
            scores=self.scores[rows],
            values=replace(
                values,
                logprob=values.logprob[rows],
                reference_logprob=values.reference_logprob[rows],
                kl=values.kl[rows],
                entropy=values.entropy[rows],
            ),
            state_index=self.state_index[rows],
            returns=self.returns[rows],
            advantages=self.advantages[rows],
            value_targets=None if targets is None else targets[rows],
        )

    def without_actions(self, rows: int, invocation: Sequence[int]) -> Experience:
        """As many rows in which nothing was done: a pass over them costs next to nothing, and its gradient is zero.

        Ranks that shard weights must make as many passes as the one with the most; this is what the others fill up with.

        Args:
            rows: How many.
            invocation: Of the policy, as for `no_actions`.
        """
        none = self.returns.new_zeros(rows, 1)
        return Experience(
            batch=no_actions(rows, self.scores.device, invocation),
            scores=self.scores.new_zeros(rows),
            values=TokenValues(none, none, none, none, self.values.reference_states),
            state_index=torch.zeros_like(none, dtype=torch.int64),
            returns=none,
            advantages=none,
            value_targets=None if self.value_targets is None else none,
        )


def no_actions(rows: int, device: torch.device, invocation: Sequence[int] = ()) -> SequenceBatch:
    """Sequences of a prompt as short as can be, and nothing after it.

    Args:
        rows: How many.
        device: Where their tensors lie.
        invocation: Tokens that a prompt must have, for an activated LoRA to act.
    """
    return SequenceBatch.build([list(invocation) or [0]] * rows, [[]] * rows, device)


def join_values(parts: Sequence[TokenValues], width: int) -> TokenValues:
    """Row blocks of different widths → one, (B, T)."""
    return TokenValues(
        logprob=join_rows([part.logprob for part in parts], width),
        reference_logprob=join_rows([part.reference_logprob for part in parts], width),
        kl=join_rows([part.kl for part in parts], width),
        entropy=join_rows([part.entropy for part in parts], width),
        reference_states=torch.cat([part.reference_states for part in parts]),
    )


def join_rows(blocks: Sequence[Tensor], width: int) -> Tensor:
    """(B_i, T_i) blocks → (Σ B_i, T), with zeros on the right."""
    return torch.cat([torch.nn.functional.pad(block, (0, width - block.shape[1])) for block in blocks])
