"""Batches of prompts and completions: conversion between (B, T) actions and the head's N rows, and packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignpro.errors import DataError
from alignpro.models.invocation import invocation_start
from alignpro.models.packed_attention import PackedLayout

_MIN_SHARED_PREFIX = 8  # tokens; a shared prefix costs two more attention calls per layer


@dataclass(frozen=True)
class SequenceBatch:
    """B sequences of prompt and completion; the longest completion has T tokens.

    A completion's tokens are the actions. Each was chosen from the hidden state at the token before it.
    """

    prompts: Sequence[Sequence[int]]
    """B lists of token ids; adjacent equal prompts are computed once."""
    completions: Sequence[Sequence[int]]
    """B lists of token ids."""
    mask: Tensor
    """(B, T) bool: True at the actions, which are left-aligned."""
    actions: Tensor
    """(B, T) int64: the action taken; 0 where there is none."""

    @classmethod
    def build(
        cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> SequenceBatch:
        """Build a batch from lists of token ids.

        Raises:
            DataError: A prompt is empty, so that its first action has no state.
            ValueError: The numbers of prompts and completions differ.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions: the numbers must be equal")
        if not all(prompts):
            raise DataError(
                f"sequence {[len(p) for p in prompts].index(0)}: its prompt is empty: a completion needs a prompt"
            )
        longest = max(1, max(map(len, completions)))
        counts = torch.tensor([len(completion) for completion in completions])
        return cls(
            prompts=prompts,
            completions=completions,
            mask=(torch.arange(longest) < counts[:, None]).to(device),
            actions=torch.tensor([list(c) + [0] * (longest - len(c)) for c in completions]).to(device),
        )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def targets(self) -> Tensor:
        """(N,) int64: the actions without padding, row by row."""
        return self.actions[self.mask]

    def scatter(self, values: Tensor) -> Tensor:
        """Scatter per-action values to their positions, zero elsewhere: (N,) → (B, T)."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)

    def select(self, rows: Tensor) -> SequenceBatch:
        """Return the sequences at the given indices."""
        index = rows.tolist()
        return SequenceBatch(
            [self.prompts[i] for i in index], [self.completions[i] for i in index], self.mask[rows], self.actions[rows]
        )

    def rows(self, start: int, stop: int) -> SequenceBatch:
        """Return the sequences ``start:stop``, without columns that are padding in all of them."""
        completions = self.completions[start:stop]
        longest = max(1, max(map(len, completions)))
        return SequenceBatch(
            self.prompts[start:stop], completions, self.mask[start:stop, :longest], self.actions[start:stop, :longest]
        )

    def pack(self, virtual_tokens: int = 0, invocation: Sequence[int] = ()) -> PackedSequences:
        """Pack all tokens whose states are needed into one row: shared prompts once, and without the last actions.

        Args:
            virtual_tokens: Length of a soft prompt, which is packed as this many ids before each prompt.
            invocation: The invocation tokens of an activated LoRA, if there is one.

        Raises:
            DataError: The invocation tokens do not occur in a prompt.
        """
        starts = (
            [virtual_tokens + invocation_start(prompt, invocation) for prompt in self.prompts] if invocation else []
        )
        prefix_length = self._shared_prefix_length(virtual_tokens, starts)
        ids: list[int] = []
        active: list[int] = []
        lengths: list[int] = []
        continuations: list[tuple[int, int]] = []
        state_indices: list[int] = []
        last = 0  # index of the last token of the current prompt
        for row, (prompt, completion) in enumerate(zip(self.prompts, self.completions, strict=True)):
            if row == 0 or list(prompt) != list(self.prompts[row - 1]):
                tokens = [-1] * virtual_tokens + list(prompt)
                packed = prefix_length if row else 0  # number of its tokens that are packed already
                if invocation:
                    active += range(len(ids) + max(starts[row] - packed, 0), len(ids) + len(tokens) - packed)
                ids += tokens[packed:]
                lengths.append(len(tokens))
                last = len(ids) - 1
            inputs = completion[:-1]  # no action follows the last token
            indices = range(len(ids), len(ids) + len(inputs))
            state_indices += [last, *indices][: len(completion)]
            active += indices
            ids += inputs
            continuations.append((len(lengths) - 1, len(inputs)))
        device = self.mask.device
        return PackedSequences(
            torch.tensor(ids, device=device),
            torch.tensor(state_indices, dtype=torch.int64, device=device),
            PackedLayout.build(lengths, continuations, device, prefix_length if len(lengths) > 1 else 0),
            torch.tensor(active, dtype=torch.int64, device=device) if invocation else None,
        )

    def _shared_prefix_length(self, virtual_tokens: int, starts: Sequence[int]) -> int:
        """Return the length of the prefix that all prompts share, short of their last token; 0 if too short to pay off.

        It is computed once, so that an activated LoRA which begins in it at different ``starts`` of the prompts ends it.
        """
        first, last = min(self.prompts, key=list), max(self.prompts, key=list)  # these differ the earliest
        limit = min(map(len, self.prompts)) - 1
        common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), limit)
        length = virtual_tokens + min(common, limit)
        if len(set(starts)) > 1:
            length = min(length, *starts)
        return length if length >= _MIN_SHARED_PREFIX else 0


@dataclass(frozen=True)
class PackedSequences:
    """B sequences packed into one row of T tokens, with N states at which actions were chosen."""

    ids: Tensor
    """(T,) int64; −1 for the virtual tokens of a soft prompt."""
    state_indices: Tensor
    """(N,) int64: index of the token at which each action was chosen, row by row."""
    layout: PackedLayout
    active: Tensor | None = None
    """(A,) int64: the tokens that an activated LoRA acts on; None without one."""
