"""Attention over packed sequences that share their prompts.

All tokens are packed into one row: first the prefix that all prompts share, then each prompt once, followed by its
continuations:

    m m | x₁ x₁ x₁ | a a a | b b | x₂ x₂ | c c c        x₁, x₂ continue m; a, b continue x₁; c continues x₂

A token attends to the segments that its own segment continues, and causally within its own. Linear layers then process
M + P·(X + K·R) tokens for P prompts with K continuations each, instead of P·K·(M + X + R).

On a CUDA device, attention too is computed without padding if a trial has measured that to be faster (`packed_choice`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from alignpro.models.attention_interface import AttentionSettings, dot_product_attention
from alignpro.models.packed_choice import Attend, unpadded_attention, unpadded_kernels
from alignpro.models.packed_parts import Segments
from alignpro_kernels.merged_attention import Part


@dataclass
class PackedLayout:
    """Where P prompts and S continuations lie in T packed tokens; attention pads them to lengths X and R.

    The first M tokens are the prefix that all prompts share.
    """

    positions: Tensor
    """(T,) int64: position of each token in its sequence."""
    prefix_length: int
    """M, the length of the shared prefix; may be 0."""
    prompt: Tensor
    """(P, X) int64: packed indices of each prompt's tokens after the shared prefix; 0 at padding, on the right."""
    prompt_lengths: Tensor
    """(P,) int64, shared prefix included."""
    parent: Tensor
    """(S,) int64: index of the prompt of each continuation."""
    continuation: Tensor
    """(S, R) int64: packed indices of each continuation's tokens; 0 at padding, on the right."""
    continuation_lengths: Tensor
    """(S,) int64."""
    pad_indices: Tensor
    """(M + P·X + S·R,) int64: packed indices in padded order: shared prefix, ``prompt``, ``continuation``, flattened."""
    unpad_indices: Tensor
    """(T,) int64: index of each token in the padded order."""
    segments: Segments
    """The lengths of all of these, on the host."""
    masks: dict[tuple[str, int | None, int], Tensor] = field(default_factory=dict)
    """Attention masks, built once per forward pass and shared by the layers."""

    @classmethod
    def build(
        cls,
        prompts: Sequence[int],
        continuations: Sequence[tuple[int, int]],
        device: torch.device,
        prefix_length: int = 0,
    ) -> PackedLayout:
        """Build the layout of prompts of given lengths, each followed by its continuations, (prompt index, length).

        Continuations are in the order of their prompts. The first ``prefix_length`` tokens are the same in all prompts
        and are stored once, before the first prompt. The lengths include them, and each prompt has at least one more
        token.
        """
        X = max(prompts) - prefix_length
        R = max((length for _, length in continuations), default=0)
        prompt = torch.zeros(len(prompts), X, dtype=torch.int64)
        continuation = torch.zeros(len(continuations), R, dtype=torch.int64)
        positions, unpad_indices = [torch.arange(prefix_length)], [torch.arange(prefix_length)]
        own: list[list[int]] = [[] for _ in prompts]
        start, row = prefix_length, 0
        for p, length in enumerate(prompts):
            span = torch.arange(length - prefix_length)
            prompt[p, : len(span)] = start + span
            positions.append(prefix_length + span)
            unpad_indices.append(prefix_length + p * X + span)
            start += len(span)
            while row < len(continuations) and continuations[row][0] == p:
                own[p].append(continuations[row][1])
                span = torch.arange(continuations[row][1])
                continuation[row, : len(span)] = start + span
                positions.append(length + span)
                unpad_indices.append(prefix_length + len(prompts) * X + row * R + span)
                start += len(span)
                row += 1
        return cls(
            positions=torch.cat(positions).to(device),
            prefix_length=prefix_length,
            prompt=prompt.to(device),
            prompt_lengths=torch.tensor(prompts, device=device),
            parent=torch.tensor([p for p, _ in continuations], dtype=torch.int64, device=device),
            continuation=continuation.to(device),
            continuation_lengths=torch.tensor([n for _, n in continuations], dtype=torch.int64, device=device),
            pad_indices=torch.cat([torch.arange(prefix_length), prompt.flatten(), continuation.flatten()]).to(device),
            unpad_indices=torch.cat(unpad_indices).to(device),
            segments=Segments(
                prefix_length,
                tuple(length - prefix_length for length in prompts),
                tuple(map(tuple, own)),
            ),
        )

    @cached_property
    def parts(self) -> list[Part]:
        """Attention of all tokens as variable-length calls, built once per forward pass and shared by the layers."""
        return self.segments.parts(self.prompt.device)

    def causal_mask(self, before: int, own: int, window: int | None) -> Tensor | None:
        """Mask of ``own`` queries over the keys ``before`` them and their own: (own, before + own) bool, True to attend.

        None if plain causal attention does. Padding is on the right, so causality hides it from the tokens.
        """
        if before == 0 and (window is None or window >= own):
            return None
        if (key := (f"causal {before}", window, own)) not in self.masks:
            span = torch.arange(before + own, device=self.prompt.device)
            distance = span[before:, None] - span
            self.masks[key] = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return self.masks[key]

    def continuation_mask(self, window: int | None, groups: int) -> Tensor:
        """Mask of continuations over the keys of their prompts and their own: (S, 1, groups·R, M + X + R) bool."""
        if (key := ("continuation", window, groups)) not in self.masks:
            device = self.prompt.device
            X, R = self.prefix_length + self.prompt.shape[1], self.continuation.shape[1]
            before, own = torch.arange(X, device=device), torch.arange(R, device=device)
            length = self.prompt_lengths[self.parent]  # (S,)
            in_prompt = (before < length[:, None])[:, None, :].expand(-1, R, -1)  # (S, R, X)
            causal = (own <= own[:, None]).expand(len(length), -1, -1)  # (S, R, R)
            if window is not None:
                gap = length[:, None, None] + own[:, None] - before
                in_prompt = in_prompt & (gap < window)
                causal = causal & (own[:, None] - own < window)
            mask = torch.cat([in_prompt, causal], dim=2)
            self.masks[key] = mask.repeat(1, groups, 1).unsqueeze(1)
        return self.masks[key]


class PackedAttention:
    """An `AttentionBackend` for packed sequences; differentiable.

    Args:
        layout: Layout of the sequences.
    """

    def __init__(self, layout: PackedLayout) -> None:
        self.layout = layout

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """See `AttentionBackend.attend`."""
        layout = self.layout
        kernels = unpadded_kernels(query, key, settings, layout.segments, padded_attention)
        if kernels is not None:
            return unpadded_attention(query, key, value, layout.parts, kernels, settings, layout.segments)
        return self.attend_padded(query, key, value, settings)

    def attend_padded(self, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """Compute attention with the sequences padded; arguments and result are those of `attend`."""
        layout = self.layout
        P, X = layout.prompt.shape
        S, R = layout.continuation.shape
        M = layout.prefix_length
        parts = []
        for x in (query, key, value):
            padded = gather_rows(x[0].transpose(0, 1), layout.pad_indices, layout.unpad_indices)
            prefix, prompts, continuations = padded.split([M, P * X, S * R])
            parts.append(
                (
                    prefix.unsqueeze(0).transpose(1, 2),  # (1, heads, M, D)
                    prompts.unflatten(0, (P, X)).transpose(1, 2),  # (P, heads, X, D)
                    continuations.unflatten(0, (S, R)).transpose(1, 2),  # (S, heads, R, D)
                )
            )
        (q_m, q, q_c), (k_m, k, k_c), (v_m, v, v_c) = parts
        rows = []
        if M:
            rows.append(self._causal(q_m, k_m, v_m, settings))
            k, v = (torch.cat([x.expand(P, -1, -1, -1), own], dim=2) for x, own in ((k_m, k), (v_m, v)))
        rows.append(self._causal(q, k, v, settings))
        if S * R:
            rows.append(continuation_attention(q_c, k_c, v_c, (k, v), layout, settings).flatten(0, 1))
        return torch.cat(rows).index_select(0, layout.unpad_indices).unsqueeze(0)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """Causal attention, (B·Q, H, D); keys in excess of the Q queries precede them and are all visible."""
        groups, own = query.shape[1] // key.shape[1], query.shape[2]
        key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
        mask = self.layout.causal_mask(key.shape[2] - own, own, settings.sliding_window)
        out = dot_product_attention(query, key, value, mask, settings, causal=True)
        return out.transpose(1, 2).flatten(0, 1)


def padded_attention(segments: Segments, device: torch.device) -> Attend:
    """Return the attention of packed sequences by padding, which runs anywhere; for the trial of `packed_choice`."""
    M = segments.prefix
    continuations = [(p, length) for p, lengths in enumerate(segments.continuations) for length in lengths]
    layout = PackedLayout.build([M + prompt for prompt in segments.prompts], continuations, device, M)
    return PackedAttention(layout).attend_padded


def continuation_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompts: tuple[Tensor, Tensor],
    layout: PackedLayout,
    settings: AttentionSettings,
) -> Tensor:
    """Compute the attention of continuations to their prompts and to themselves.

    Args:
        query: (S, H, R, D).
        key: (S, H', R, D), H a multiple of H'.
        value: As ``key``.
        prompts: Keys and values of the prompts, shared prefix included, (P, H', M + X, D) each.
        layout: Layout of the sequences.
        settings: How the layer computes its attention.

    Returns:
        (S, R, H, D), differentiable.
    """
    groups = query.shape[1] // key.shape[1]
    # Fold the query heads that share a key head into the query dimension, so that keys are not repeated.
    folded = query.unflatten(1, (key.shape[1], groups)).flatten(2, 3)  # (S, H', groups·R, D)
    keys, values = (
        torch.cat([before.index_select(0, layout.parent), own], dim=2)
        for before, own in zip(prompts, (key, value), strict=True)
    )
    mask = layout.continuation_mask(settings.sliding_window, groups)
    out = dot_product_attention(folded, keys, values, mask, settings)
    return out.unflatten(2, (groups, query.shape[2])).flatten(1, 2).transpose(1, 2)


def gather_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Return x[index], differentiable. Each row is gathered once, apart from padding; ``inverse`` is its index there."""
    rows: Tensor = _Gather.apply(x, index, inverse)
    return rows


class _Gather(torch.autograd.Function):
    """Gathers rows, each once apart from padding, whose gradient is zero. So the backward pass is a gather too.

    PyTorch's own backward accumulates row by row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None
