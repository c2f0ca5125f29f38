"""A rollout with the values that the update needs: joined from micro-batches, split into minibatches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignpro.data import Prompt
from alignpro.engine import Chain
from alignpro.models.sequences import SequenceBatch
from alignpro.objectives import ImportanceWeights
from alignpro.policy.reference_logprobs import TokenStats


@dataclass(frozen=True)
class Experience:
    """A rollout with the values that the update needs: B = P·K rows, prompt-major, of at most T actions."""

    batch: SequenceBatch
    scores: Tensor
    """(B,) R."""
    values: TokenStats
    """Values under the policy that generated the samples."""
    state_index: Tensor
    """(B, T) int64: the row of ``values.reference_states`` for each action."""
    returns: Tensor
    """(B, T) G_t: the score minus the KL still to come, as far as the KL estimator makes it part of the reward."""
    advantages: Tensor
    """(B, T)."""
    weights: Tensor | None
    """(B,) weight of each row's terms in the loss, if the advantage weights them."""
    value_targets: Tensor | None
    """(B, T), for the critic."""
    importance: ImportanceWeights | None = None
    """(B,) of the whole rollout, if an earlier policy drew it; they are part of ``weights``."""

    def select(self, groups: Tensor, size: int) -> Experience:
        """Select the rows of some groups of ``size``, as `select_rows` does."""
        return self.select_rows((groups[:, None] * size + torch.arange(size)).flatten())

    def select_rows(self, rows: Tensor) -> Experience:
        """Select some rows; reference states stay whole: ``state_index`` points into them."""
        rows = rows.to(self.scores.device)
        values, weights, targets = self.values, self.weights, self.value_targets
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
            weights=None if weights is None else weights[rows],
            value_targets=None if targets is None else targets[rows],
        )

    def without_actions(self, rows: int, invocation: Sequence[int]) -> Experience:
        """Return rows without actions: a pass over them costs next to nothing, and its gradient is zero.

        Ranks that shard weights must all make the same number of passes; a rank with fewer micro-batches than another
        makes its remaining passes over such rows.

        Args:
            rows: Number of rows.
            invocation: The policy's invocation tokens, as for `no_actions`.
        """
        none = self.returns.new_zeros(rows, 1)
        return Experience(
            batch=no_actions(rows, self.scores.device, invocation),
            scores=self.scores.new_zeros(rows),
            values=TokenStats(none, none, none, none, self.values.reference_states, self.values.policy_states),
            state_index=torch.zeros_like(none, dtype=torch.int64),
            returns=none,
            advantages=none,
            weights=None if self.weights is None else none[:, 0],
            value_targets=None if self.value_targets is None else none,
        )


def sample_batch(
    encode: Callable[[Prompt], Sequence[int]],
    prompts: Sequence[Prompt],
    chains: Sequence[Sequence[Chain]],
    device: torch.device,
) -> SequenceBatch:
    """Build the batch of P·K samples with their prompts, prompt-major.

    Args:
        encode: The policy's input for a prompt.
        prompts: P prompts.
        chains: [P][K].
        device: Device of the tensors.
    """
    inputs = [ids for prompt, group in zip(prompts, chains, strict=True) for ids in [encode(prompt)] * len(group)]
    return SequenceBatch.build(inputs, [chain.sample.tokens for group in chains for chain in group], device)


def sampled_logprob(chains: Sequence[Sequence[Chain]], mask: Tensor) -> Tensor:
    """Return log-probabilities under the distribution from which samples were drawn, (B, T) float64 on the CPU, 0 past the end.

    Args:
        chains: [P][K].
        mask: (B, T) bool, True at the actions of the same samples.
    """
    drawn = torch.tensor([x for group in chains for chain in group for x in chain.sample.logprobs], dtype=torch.float64)
    return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter_(mask.cpu(), drawn)


def no_actions(rows: int, device: torch.device, invocation: Sequence[int] = ()) -> SequenceBatch:
    """Build sequences with the shortest possible prompt and no actions.

    Args:
        rows: Number of sequences.
        device: Device of the tensors.
        invocation: Tokens that a prompt must contain to activate an activated LoRA.
    """
    return SequenceBatch.build([list(invocation) or [0]] * rows, [[]] * rows, device)


def join_values(parts: Sequence[TokenStats], rows: int, width: int) -> TokenStats:
    """Join row blocks of different widths into one, (B, T); rows beyond B are dropped: passes without actions."""
    return TokenStats(
        logprob=join_rows([part.logprob for part in parts], rows, width),
        reference_logprob=join_rows([part.reference_logprob for part in parts], rows, width),
        kl=join_rows([part.kl for part in parts], rows, width),
        entropy=join_rows([part.entropy for part in parts], rows, width),
        reference_states=torch.cat([part.reference_states for part in parts]),
        policy_states=torch.cat([part.policy_states for part in parts]),
    )


def join_rows(blocks: Sequence[Tensor], rows: int, width: int) -> Tensor:
    """Join (B_i, T_i) blocks into (B, T), with zero padding on the right; rows beyond B are dropped."""
    return torch.cat([torch.nn.functional.pad(block, (0, width - block.shape[1])) for block in blocks])[:rows]
