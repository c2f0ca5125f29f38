"""Prompts and completions as padded tensors, and the map between (B, T) actions and the N rows that a head sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignpro.errors import DataError


@dataclass(frozen=True)
class SequenceBatch:
    """B sequences of prompt and completion, padded on the right to length L; the longest completion has T tokens.

    A completion's tokens are the actions. ``positions`` says where the state is in which an action was chosen: at the
    token before it.
    """

    ids: Tensor
    """(B, L) int64."""
    attention_mask: Tensor
    """(B, L) bool."""
    mask: Tensor
    """(B, T) bool: True at the actions, which are left-aligned."""
    positions: Tensor
    """(B, T) int64: the index into L of the state of each action; 0 where there is none."""
    actions: Tensor
    """(B, T) int64: the action taken; 0 where there is none."""

    @classmethod
    def build(
        cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> SequenceBatch:
        """Pad token lists.

        Raises:
            DataError: A prompt has no token: an action needs a state.
        """
        if not all(prompts):
            raise DataError(
                f"sequence {[len(p) for p in prompts].index(0)}: its prompt has no token: nothing to go on from"
            )
        rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        length, longest = max(map(len, rows)), max(1, max(map(len, completions)))
        starts = torch.tensor([len(prompt) for prompt in prompts])
        counts = torch.tensor([len(completion) for completion in completions])
        offsets = torch.arange(longest)
        mask = offsets < counts[:, None]
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        return cls(
            ids=ids.to(device),
            attention_mask=(torch.arange(length) < (starts + counts)[:, None]).to(device),
            mask=mask.to(device),
            positions=((starts[:, None] - 1 + offsets) * mask).to(device),
            actions=torch.tensor([list(c) + [0] * (longest - len(c)) for c in completions]).to(device),
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> Tensor:
        """(N,) int64: the actions alone, row by row."""
        return self.actions[self.mask]

    def action_states(self, hidden: Tensor) -> Tensor:
        """The hidden states in which the actions were chosen: (B, L, D) → (N, D)."""
        rows = torch.arange(len(self.ids), device=hidden.device)[:, None].expand_as(self.positions)
        return hidden[rows[self.mask], self.positions[self.mask]]

    def scatter(self, values: Tensor) -> Tensor:
        """Per-action values back in place, zero elsewhere: (N,) → (B, T)."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)

    def select(self, rows: Tensor) -> SequenceBatch:
        """The sequences of the given indices."""
        return SequenceBatch(
            self.ids[rows], self.attention_mask[rows], self.mask[rows], self.positions[rows], self.actions[rows]
        )

    def rows(self, start: int, stop: int) -> SequenceBatch:
        """Sequences start..stop, with padding that none of them needs cut off."""
        mask, attention = self.mask[start:stop], self.attention_mask[start:stop]
        longest, length = max(1, int(mask.sum(1).max())), int(attention.sum(1).max())
        return SequenceBatch(
            ids=self.ids[start:stop, :length],
            attention_mask=attention[:, :length],
            mask=mask[:, :longest],
            positions=self.positions[start:stop, :longest],
            actions=self.actions[start:stop, :longest],
        )
