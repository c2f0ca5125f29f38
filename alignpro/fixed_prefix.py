"""Passes over sequences under an activated LoRA: what stands before the invocation is computed once, and without gradients.

The tokens before the invocation are the base model's, which is frozen. So no gradient flows through them, and the policy
and its reference have them in common:

    m m x x x            computed once, keys and values kept; what all prompts begin with, once for all
             | i a a     from the invocation i on, sequence by sequence: once for the policy,
             | i b b     and once, without the LoRA, for the reference

The price is that the invocation is computed once a sequence, and not once a prompt. Where that is more than is saved,
sequences are packed with their prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from alignpro.activated_lora import invoked_at
from alignpro.attention import Layout, attend_continuations, gather_rows, packed_attention
from alignpro.language_model import LanguageModel
from alignpro.sequences import PackedSequences, SequenceBatch

_BACKWARD = 2
"""Cost of a token's backward pass, in forward passes."""


def policy_states(model: LanguageModel, batch: SequenceBatch) -> Tensor:
    """As `LanguageModel.action_states`, of an activated LoRA on a frozen model, differentiable: (N, D).

    Raises:
        DataError: A prompt lacks the invocation tokens.
    """
    split = _split(model, batch, passes=1)
    if split is None:
        return model.action_states(batch)
    return _from_invocation(model, split, _prefix(model, split))


def policy_and_base_states(model: LanguageModel, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    """The states of an activated LoRA on a frozen model, differentiable, and those of the model without it: (N, D) each.

    Raises:
        DataError: A prompt lacks the invocation tokens.
    """
    split = _split(model, batch, passes=2)
    if split is None:
        states = model.action_states(batch)
        with torch.no_grad(), model.adapter_off():
            return states, model.action_states(batch)
    prefix = _prefix(model, split)
    states = _from_invocation(model, split, prefix)
    with torch.no_grad():
        return states, _from_invocation(model, split, prefix, acts=False)


@dataclass(frozen=True)
class SplitSequences:
    """Sequences on two lines: P prefixes of X tokens at most, and S sequences that go on from there, of R at most."""

    prefixes: PackedSequences
    ids: Tensor
    """(T,) int64: from the invocations on."""
    positions: Tensor
    """(T,) int64: of each token in its sequence."""
    chosen: Tensor
    """(N,) int64: the tokens at which actions were chosen."""
    layout: Layout
    """Of prefixes and sequences as if they lay on one line: who goes on from what."""
    order: Tensor
    """(S·R,) int64: the tokens of sequences that are padded to R."""
    place: Tensor
    """(T,) int64: where each token is among these."""


class PrefixPlan:
    """Attention of prefixes, which keeps their keys and values.

    Args:
        layout: Of prefixes alone.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        shared = torch.arange(layout.shared, device=layout.prompt.device).expand(len(layout.prompt), -1)
        self.tokens = torch.cat([shared, layout.prompt], dim=1)
        """(P, X) int64: those of each prefix; 0 behind its end."""
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        """Layer → keys and values, (P, H', X, D)."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        softcap: float | None,
        sliding_window: int | None,
    ) -> Tensor:
        """As `alignpro.attention.Plan.attend`."""
        keys, values = (x[0][:, self.tokens].transpose(0, 1) for x in (key, value))
        self.kept[layer] = keys, values
        return packed_attention(
            query, key, value, self.layout, scaling=scaling, softcap=softcap, sliding_window=sliding_window
        )


class ContinuationPlan:
    """Attention of what goes on from prefixes, to itself and to them.

    Args:
        split: The sequences.
        prefix: Has seen their prefixes.
    """

    def __init__(self, split: SplitSequences, prefix: PrefixPlan) -> None:
        self.split, self.prefix = split, prefix

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        softcap: float | None,
        sliding_window: int | None,
    ) -> Tensor:
        """As `alignpro.attention.Plan.attend`."""
        split, layout = self.split, self.split.layout
        S, R = layout.continuation.shape
        q, k, v = (
            gather_rows(x[0].transpose(0, 1), split.order, split.place).unflatten(0, (S, R)).transpose(1, 2)
            for x in (query, key, value)
        )  # (S, heads, R, D)
        before = self.prefix.kept[layer]
        rows = attend_continuations(
            q, k, v, before, layout, scaling=scaling, softcap=softcap, sliding_window=sliding_window
        )
        return rows.flatten(0, 1).index_select(0, split.place).unsqueeze(0)


def _prefix(model: LanguageModel, split: SplitSequences) -> PrefixPlan:
    plan = PrefixPlan(split.prefixes.layout)
    with torch.no_grad():
        model.paged_states(split.prefixes.ids, split.prefixes.layout.positions, plan, active=False)
    return plan


def _from_invocation(model: LanguageModel, split: SplitSequences, prefix: PrefixPlan, *, acts: bool = True) -> Tensor:
    """(N, D): with the LoRA, or without it."""
    plan = ContinuationPlan(split, prefix)
    return model.paged_states(split.ids, split.positions, plan, active=acts).index_select(0, split.chosen)


def _split(model: LanguageModel, batch: SequenceBatch, *, passes: int) -> SplitSequences | None:
    """The sequences apart from their prefixes; None if that makes more work of so many forward passes and a backward one."""
    prefixes: list[Sequence[int]] = []
    ids: list[int] = []
    chosen: list[int] = []
    continuations: list[tuple[int, int]] = []
    sequences = zip(batch.prompts, batch.completions, strict=True)
    for prompt, group in groupby(sequences, key=lambda sequence: list(sequence[0])):
        before = invoked_at(prompt, model.invocation)
        if before == 0:
            return None
        if not prefixes or prompt[:before] != prefixes[-1]:
            prefixes.append(prompt[:before])
        for _, completion in group:
            inner = completion[:-1]  # nothing is chosen after the last action
            first = len(ids) + len(prompt) - before - 1  # where the first action is chosen
            chosen += range(first, first + len(completion))
            ids += [*prompt[before:], *inner]
            continuations.append((len(prefixes) - 1, len(prompt) - before + len(inner)))
    device = batch.mask.device
    before_all = SequenceBatch.build(prefixes, [()] * len(prefixes), device).pack()
    cost = passes + (_BACKWARD if torch.is_grad_enabled() else 0)
    if len(before_all.ids) + cost * len(ids) >= cost * len(batch.pack().ids):
        return None
    layout = Layout.build([len(prefix) for prefix in prefixes], continuations, device)
    behind = layout.place >= layout.prompt.numel()  # which tokens of both lines are of the second
    line = (behind.cumsum(0) - 1).clamp_min(0)  # and where on it
    return SplitSequences(
        prefixes=before_all,
        ids=torch.tensor(ids, device=device),
        positions=layout.positions[behind],
        chosen=torch.tensor(chosen, dtype=torch.int64, device=device),
        layout=layout,
        order=line[layout.continuation.flatten()],
        place=layout.place[behind] - layout.prompt.numel(),
    )
