"""Prompts and completions, the map between (B, T) actions and the N rows that a head sees, and the packed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignpro.activated_lora import invoked_at
from alignpro.attention import Layout
from alignpro.errors import DataError

_FEWEST_SHARED = 8  # tokens: attention to them takes two more calls a layer


@dataclass(frozen=True)
class SequenceBatch:
    """B sequences of prompt and completion; the longest completion has T tokens.

    A completion's tokens are the actions. Each was chosen in the state at the token before it.
    """

    prompts: Sequence[Sequence[int]]
    """B lists of token ids; neighbours that are equal are computed once."""
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
        """Take token lists.

        Raises:
            DataError: A prompt has no token: an action needs a state.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions: they must be as many")
        if not all(prompts):
            raise DataError(
                f"sequence {[len(p) for p in prompts].index(0)}: its prompt has no token: nothing to go on from"
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
        """(N,) int64: the actions alone, row by row."""
        return self.actions[self.mask]

    def scatter(self, values: Tensor) -> Tensor:
        """Per-action values back in place, zero elsewhere: (N,) → (B, T)."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)

    def select(self, rows: Tensor) -> SequenceBatch:
        """The sequences of the given indices."""
        index = rows.tolist()
        return SequenceBatch(
            [self.prompts[i] for i in index], [self.completions[i] for i in index], self.mask[rows], self.actions[rows]
        )

    def rows(self, start: int, stop: int) -> SequenceBatch:
        """Sequences start..stop, with columns that none of them needs cut off."""
        completions = self.completions[start:stop]
        longest = max(1, max(map(len, completions)))
        return SequenceBatch(
            self.prompts[start:stop], completions, self.mask[start:stop, :longest], self.actions[start:stop, :longest]
        )

    def pack(self, virtual_tokens: int = 0, invocation: Sequence[int] = ()) -> PackedSequences:
        """All tokens whose states are wanted, on one line: prompts that are shared once, and no last action.

        Args:
            virtual_tokens: Length of a soft prompt, which takes the place of as many ids before each prompt.
            invocation: The tokens from which on an activated LoRA acts, if there is one.

        Raises:
            DataError: They do not occur in a prompt.
        """
        shared = self._shared_tokens(virtual_tokens)
        ids: list[int] = []
        active: list[int] = []
        lengths: list[int] = []
        continuations: list[tuple[int, int]] = []
        states: list[int] = []
        last = 0  # the state at the end of the prompt at hand
        for row, (prompt, completion) in enumerate(zip(self.prompts, self.completions, strict=True)):
            if row == 0 or list(prompt) != list(self.prompts[row - 1]):
                whole = [-1] * virtual_tokens + list(prompt)
                here = shared if row else 0  # tokens that are there already
                if invocation:
                    acts = virtual_tokens + invoked_at(prompt, invocation)
                    active += range(len(ids) + max(acts - here, 0), len(ids) + len(whole) - here)
                ids += whole[here:]
                lengths.append(len(whole))
                last = len(ids) - 1
            inner = completion[:-1]  # nothing is chosen after the last action
            own = range(len(ids), len(ids) + len(inner))
            states += [last, *own][: len(completion)]
            active += own
            ids += inner
            continuations.append((len(lengths) - 1, len(inner)))
        device = self.mask.device
        return PackedSequences(
            torch.tensor(ids, device=device),
            torch.tensor(states, dtype=torch.int64, device=device),
            Layout.build(lengths, continuations, device, shared if len(lengths) > 1 else 0),
            torch.tensor(active, dtype=torch.int64, device=device) if invocation else None,
        )

    def _shared_tokens(self, virtual_tokens: int) -> int:
        """How many tokens all prompts begin with, one of each left over; 0 where it is not worth the trouble."""
        first, last = min(self.prompts, key=list), max(self.prompts, key=list)  # the most different ones
        most = min(map(len, self.prompts)) - 1
        common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), most)
        shared = virtual_tokens + min(common, most)
        return shared if shared >= _FEWEST_SHARED else 0


@dataclass(frozen=True)
class PackedSequences:
    """B sequences on one line of T tokens, with N states in which actions were chosen."""

    ids: Tensor
    """(T,) int64; −1 at the places of a soft prompt."""
    states: Tensor
    """(N,) int64: the token at which each action was chosen, row by row."""
    layout: Layout
    active: Tensor | None = None
    """(A,) int64: the tokens that an activated LoRA acts on; None where there is none."""
