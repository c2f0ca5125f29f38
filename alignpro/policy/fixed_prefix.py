"""Forward passes under an activated LoRA that compute the tokens before the invocation once and without gradients.

The frozen base model computes the tokens before the invocation. So no gradient flows through them, and the policy and its
reference share them:

    m m x x x            computed once, keys and values kept; the prefix m of all prompts only once
             | i a a     from the invocation i on, per sequence: once for the policy,
             | i b b     and once, without the LoRA, for the reference

The price is that the invocation is computed once per sequence instead of once per prompt. If that costs more than it
saves, sequences are packed with their prompts instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from alignpro.models.attention_interface import AttentionSettings
from alignpro.models.invocation import invocation_start
from alignpro.models.language_model import LanguageModel
from alignpro.models.packed_attention import (
    PackedAttention,
    PackedLayout,
    continuation_attention,
    gather_rows,
    padded_attention,
)
from alignpro.models.packed_choice import unpadded_attention, unpadded_kernels
from alignpro.models.sequences import PackedSequences, SequenceBatch
from alignpro_kernels.merged_attention import Part

_BACKWARD_COST = 2
"""Cost of a backward pass, in forward passes."""


def policy_states(model: LanguageModel, batch: SequenceBatch) -> Tensor:
    """Compute `LanguageModel.action_states` of an activated LoRA on a frozen model, differentiable: (N, D).

    Raises:
        DataError: A prompt lacks the invocation tokens.
    """
    split = _split(model, batch, passes=1)
    if split is None:
        return model.action_states(batch)
    return _continuation_states(model, split, _run_prefixes(model, split))


def policy_and_base_states(model: LanguageModel, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    """Compute the states of an activated LoRA on a frozen model, differentiable, and those without it: (N, D) each.

    Raises:
        DataError: A prompt lacks the invocation tokens.
    """
    split = _split(model, batch, passes=2)
    if split is None:
        states = model.action_states(batch)
        with torch.no_grad(), model.disable_adapter():
            return states, model.action_states(batch)
    prefix = _run_prefixes(model, split)
    states = _continuation_states(model, split, prefix)
    with torch.no_grad():
        return states, _continuation_states(model, split, prefix, active=False)


@dataclass(frozen=True)
class SplitSequences:
    """Two packed rows: P prefixes of at most X tokens, and the S sequences that continue them, of at most R tokens."""

    prefixes: PackedSequences
    ids: Tensor
    """(T,) int64: the tokens of the sequences from the invocation on."""
    positions: Tensor
    """(T,) int64: position of each token in its sequence."""
    state_indices: Tensor
    """(N,) int64: index of the token at which each action was chosen."""
    layout: PackedLayout
    """Layout of prefixes and sequences as if packed into one row: which sequence continues which prefix."""
    pad_indices: Tensor
    """(S·R,) int64: token indices of the sequences, padded to R."""
    unpad_indices: Tensor
    """(T,) int64: index of each token in the padded sequences."""


class PrefixAttention(PackedAttention):
    """Computes the attention of prefixes and saves their keys and values.

    Args:
        layout: Layout of the prefixes alone.
    """

    def __init__(self, layout: PackedLayout) -> None:
        super().__init__(layout)
        shared = torch.arange(layout.prefix_length, device=layout.prompt.device).expand(len(layout.prompt), -1)
        self.tokens = torch.cat([shared, layout.prompt], dim=1)
        """(P, X) int64: token indices of each prefix; 0 at padding."""
        self.saved: dict[int, tuple[Tensor, Tensor]] = {}
        """Layer → keys and values, (P, H', X, D)."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """See `alignpro.models.attention_interface.AttentionBackend.attend`."""
        keys, values = (x[0][:, self.tokens].transpose(0, 1) for x in (key, value))
        self.saved[layer] = keys, values
        return super().attend(layer, query, key, value, settings)


class ContinuationAttention:
    """Computes the attention of the sequences to their prefixes and to themselves.

    Args:
        split: The sequences.
        prefix: The attention that has computed their prefixes.
    """

    def __init__(self, split: SplitSequences, prefix: PrefixAttention) -> None:
        self.split, self.prefix = split, prefix

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """See `alignpro.models.attention_interface.AttentionBackend.attend`."""
        split, layout = self.split, self.split.layout
        kernels = unpadded_kernels(query, key, settings, layout.segments, padded_attention)
        if kernels is not None:
            key, value = self._with_prefixes(layer, key, value)
            return unpadded_attention(query, key, value, self.parts, kernels, settings, layout.segments)
        S, R = layout.continuation.shape
        q, k, v = (
            gather_rows(x[0].transpose(0, 1), split.pad_indices, split.unpad_indices)
            .unflatten(0, (S, R))
            .transpose(1, 2)
            for x in (query, key, value)
        )  # (S, heads, R, D)
        rows = continuation_attention(q, k, v, self.prefix.saved[layer], layout, settings)
        return rows.flatten(0, 1).index_select(0, split.unpad_indices).unsqueeze(0)

    @cached_property
    def parts(self) -> list[Part]:
        """Attention of the sequences as variable-length calls, built once per forward pass and shared by the layers."""
        return self.split.layout.segments.continuation_parts(self.split.ids.device)

    @cached_property
    def _prefix_rows(self) -> Tensor:
        """(U,) int64: where the tokens of the prefixes are among the (P·X) saved ones."""
        X = self.prefix.tokens.shape[1]
        lengths = torch.tensor(self.split.layout.segments.prompts)
        return (torch.arange(X) < lengths[:, None]).flatten().nonzero().squeeze(1).to(self.split.ids.device)

    def _with_prefixes(self, layer: int, key: Tensor, value: Tensor) -> Iterator[Tensor]:
        """The keys and values of all prefixes without padding, followed by the sequences' own, (1, H', U + T, D) each."""
        for saved, own in zip(self.prefix.saved[layer], (key, value), strict=True):
            rows = saved.transpose(1, 2).flatten(0, 1).index_select(0, self._prefix_rows)  # (U, H', D)
            yield torch.cat([rows.transpose(0, 1).unsqueeze(0), own], dim=2)


def _run_prefixes(model: LanguageModel, split: SplitSequences) -> PrefixAttention:
    attention = PrefixAttention(split.prefixes.layout)
    with torch.no_grad():
        model.token_states(split.prefixes.ids, split.prefixes.layout.positions, attention, active=False)
    return attention


def _continuation_states(
    model: LanguageModel, split: SplitSequences, prefix: PrefixAttention, *, active: bool = True
) -> Tensor:
    """Compute the states with the LoRA, or without it if it is not ``active``: (N, D)."""
    attention = ContinuationAttention(split, prefix)
    return model.token_states(split.ids, split.positions, attention, active).index_select(0, split.state_indices)


def _split(model: LanguageModel, batch: SequenceBatch, *, passes: int) -> SplitSequences | None:
    """Split sequences from their prefixes; None if that costs more, for ``passes`` forward passes and any backward pass."""
    model.check_lengths(batch)
    prefixes: list[Sequence[int]] = []
    ids: list[int] = []
    state_indices: list[int] = []
    continuations: list[tuple[int, int]] = []
    sequences = zip(batch.prompts, batch.completions, strict=True)
    for prompt, group in groupby(sequences, key=lambda sequence: list(sequence[0])):
        before = invocation_start(prompt, model.invocation)
        if before == 0:
            return None
        if not prefixes or prompt[:before] != prefixes[-1]:
            prefixes.append(prompt[:before])
        for _, completion in group:
            inputs = completion[:-1]  # no action follows the last token
            first = len(ids) + len(prompt) - before - 1  # the token at which the first action is chosen
            state_indices += range(first, first + len(completion))
            ids += [*prompt[before:], *inputs]
            continuations.append((len(prefixes) - 1, len(prompt) - before + len(inputs)))
    device = batch.mask.device
    packed_prefixes = SequenceBatch.build(prefixes, [()] * len(prefixes), device).pack()
    cost = passes + (_BACKWARD_COST if torch.is_grad_enabled() else 0)
    if len(packed_prefixes.ids) + cost * len(ids) >= cost * len(batch.pack().ids):
        return None
    layout = PackedLayout.build([len(prefix) for prefix in prefixes], continuations, device)
    continues = (
        layout.unpad_indices >= layout.prompt.numel()
    )  # which tokens of the joint layout belong to the second row
    index = (continues.cumsum(0) - 1).clamp_min(0)  # and their indices in that row
    return SplitSequences(
        prefixes=packed_prefixes,
        ids=torch.tensor(ids, device=device),
        positions=layout.positions[continues],
        state_indices=torch.tensor(state_indices, dtype=torch.int64, device=device),
        layout=layout,
        pad_indices=index[layout.continuation.flatten()],
        unpad_indices=layout.unpad_indices[continues] - layout.prompt.numel(),
    )
