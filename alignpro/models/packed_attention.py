"""Attention over packed sequences that share their prompts, inside unmodified transformers models.

All tokens are packed into one row: first the prefix that all prompts share, then each prompt once, followed by its
continuations:

    m m | x₁ x₁ x₁ | a a a | b b | x₂ x₂ | c c c        x₁, x₂ continue m; a, b continue x₁; c continues x₂

A token attends to the segments that its own segment continues, and causally within its own. Linear layers then process
M + P·(X + K·R) tokens for P prompts with K continuations each, instead of P·K·(M + X + R).

`attach` installs an attention function in a model through transformers' `AttentionInterface`. If the forward call has a
`Layout` among its keyword arguments, this function computes attention over packed sequences. If it has a `Plan`, it
delegates to the plan; generation does this, with keys and values in a paged pool. With neither, it calls the model's
original attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_PREFIX = "alignpro_"


@dataclass
class Layout:
    """Where P prompts and S continuations lie in T packed tokens; attention pads them to lengths X and R.

    The first M tokens are the prefix that all prompts share.
    """

    positions: Tensor
    """(T,) int64: position of each token in its sequence."""
    shared: int
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
    place: Tensor
    """(T,) int64: index of each token in the padded order, that of ``order``."""
    order: Tensor
    """(M + P·X + S·R,) int64: packed indices in padded order: shared prefix, ``prompt``, ``continuation``, flattened."""
    masks: dict[tuple[str, int | None, int], Tensor] = field(default_factory=dict)
    """Attention masks, built once per forward pass and shared by the layers."""

    @classmethod
    def build(
        cls, prompts: Sequence[int], continuations: Sequence[tuple[int, int]], device: torch.device, shared: int = 0
    ) -> Layout:
        """Build the layout of prompts of given lengths, each followed by its continuations, (prompt index, length).

        Continuations are in the order of their prompts. The first ``shared`` tokens are the same in all prompts and are
        stored once, before the first prompt. The lengths include them, and each prompt has at least one more token.
        """
        X, R = max(prompts) - shared, max((length for _, length in continuations), default=0)
        prompt = torch.zeros(len(prompts), X, dtype=torch.int64)
        continuation = torch.zeros(len(continuations), R, dtype=torch.int64)
        positions, place = [torch.arange(shared)], [torch.arange(shared)]
        at, row = shared, 0
        for p, length in enumerate(prompts):
            span = torch.arange(length - shared)
            prompt[p, : len(span)] = at + span
            positions.append(shared + span)
            place.append(shared + p * X + span)
            at += len(span)
            while row < len(continuations) and continuations[row][0] == p:
                span = torch.arange(continuations[row][1])
                continuation[row, : len(span)] = at + span
                positions.append(length + span)
                place.append(shared + len(prompts) * X + row * R + span)
                at += len(span)
                row += 1
        return cls(
            positions=torch.cat(positions).to(device),
            shared=shared,
            prompt=prompt.to(device),
            prompt_lengths=torch.tensor(prompts, device=device),
            parent=torch.tensor([p for p, _ in continuations], dtype=torch.int64, device=device),
            continuation=continuation.to(device),
            continuation_lengths=torch.tensor([n for _, n in continuations], dtype=torch.int64, device=device),
            place=torch.cat(place).to(device),
            order=torch.cat([torch.arange(shared), prompt.flatten(), continuation.flatten()]).to(device),
        )

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
            X, R = self.shared + self.prompt.shape[1], self.continuation.shape[1]
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


class Plan(Protocol):
    """Attention that stores keys and values itself."""

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
        """Compute the attention of T new tokens in one layer.

        Args:
            layer: Index of the layer.
            query: (1, H, T, D).
            key: (1, H', T, D), H a multiple of H'.
            value: As ``key``.
            scaling: Scale of the scores; 1/√D if None.
            softcap: Scores become softcap · tanh(score / softcap).
            sliding_window: Number of tokens, itself included, that a token attends to.

        Returns:
            (1, T, H, D).
        """


def attach(model: PreTrainedModel) -> None:
    """Make a model's attention accept a `Layout` or a `Plan`; without either it behaves as before.

    Raises:
        ValueError: The model's attention does not go through transformers' interface.
    """
    base = model.config._attn_implementation
    if base.startswith(_PREFIX):
        return
    name = _PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _attention(base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ValueError("its attention does not go through transformers' AttentionInterface")


def _attention(base: str) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        layout: Layout | None = None,
        plan: Plan | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if plan is not None:
            return _planned(plan, module, query, key, value, scaling, **options), None
        if layout is not None:
            return packed_attention(query, key, value, layout, scaling=scaling, dropout=dropout, **options), None
        if base == "eager":  # transformers defines it in each model's own file, not in its interface
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
            mask = attention_mask[..., : key.shape[2]] if attention_mask is not None else None
            out = attend(query, key, value, mask, scaling, options.get("softcap"), dropout)
            return out.transpose(1, 2).contiguous(), None
        function = ALL_ATTENTION_FUNCTIONS[base]
        result: tuple[Tensor, None] = function(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return result

    return attention


def _planned(
    plan: Plan,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    if s_aux is not None:
        raise ValueError("attention sinks are not supported")
    layer = module.layer_idx
    assert isinstance(layer, int)
    return plan.attend(layer, query, key, value, scaling=scaling, softcap=softcap, sliding_window=sliding_window)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Compute attention over packed sequences.

    Args:
        query: (1, H, T, D).
        key: (1, H', T, D), H a multiple of H'.
        value: As ``key``.
        layout: Layout of the sequences.
        scaling: Scale of the scores; 1/√D if None.
        dropout: Dropout rate of the attention probabilities.
        softcap: Scores become softcap · tanh(score / softcap).
        sliding_window: Number of tokens, itself included, that a token attends to.
        s_aux: Attention sinks, which are not supported.

    Returns:
        (1, T, H, D), differentiable.

    Raises:
        ValueError: The model has attention sinks.
    """
    if s_aux is not None:
        raise ValueError("attention sinks are not supported")
    groups = query.shape[1] // key.shape[1]
    P, X = layout.prompt.shape
    S, R = layout.continuation.shape
    M = layout.shared
    parts = []
    for x in (query, key, value):
        rows = _Gather.apply(x[0].transpose(0, 1), layout.order, layout.place)
        shared, first, second = rows.split([M, P * X, S * R])
        parts.append(
            (
                shared.unsqueeze(0).transpose(1, 2),  # (1, heads, M, D)
                first.unflatten(0, (P, X)).transpose(1, 2),  # (P, heads, X, D)
                second.unflatten(0, (S, R)).transpose(1, 2),  # (S, heads, R, D)
            )
        )
    (q_m, q, q_c), (k_m, k, k_c), (v_m, v, v_c) = parts

    def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention; keys in excess of the queries precede them and are all visible."""
        key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
        own = query.shape[2]
        mask = layout.causal_mask(key.shape[2] - own, own, sliding_window)
        out = attend(query, key, value, mask, scaling, softcap, dropout, causal=True)
        return out.transpose(1, 2).flatten(0, 1)

    rows = []
    if M:
        rows.append(causal(q_m, k_m, v_m))
        k, v = (torch.cat([x.expand(P, -1, -1, -1), own], dim=2) for x, own in ((k_m, k), (v_m, v)))
    rows.append(causal(q, k, v))
    if S * R:
        out = attend_continuations(
            q_c,
            k_c,
            v_c,
            (k, v),
            layout,
            scaling=scaling,
            dropout=dropout,
            softcap=softcap,
            sliding_window=sliding_window,
        )
        rows.append(out.flatten(0, 1))
    return torch.cat(rows).index_select(0, layout.place).unsqueeze(0)


def attend_continuations(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompts: tuple[Tensor, Tensor],
    layout: Layout,
    *,
    scaling: float | None,
    softcap: float | None,
    sliding_window: int | None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute the attention of continuations to their prompts and to themselves.

    Args:
        query: (S, H, R, D).
        key: (S, H', R, D), H a multiple of H'.
        value: As ``key``.
        prompts: Keys and values of the prompts, shared prefix included, (P, H', M + X, D) each.
        layout: Layout of the sequences.
        scaling: Scale of the scores; 1/√D if None.
        softcap: Scores become softcap · tanh(score / softcap).
        sliding_window: Number of tokens, itself included, that a token attends to.
        dropout: Dropout rate of the attention probabilities.

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
    out = attend(folded, keys, values, layout.continuation_mask(sliding_window, groups), scaling, softcap, dropout)
    return out.unflatten(2, (groups, query.shape[2])).flatten(1, 2).transpose(1, 2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    dropout: float,
    *,
    causal: bool = False,
) -> Tensor:
    """Compute softmax(scores) · value, (B, H, Q, D). A mask is bool or added to the scores, and overrides ``causal``."""
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=causal and mask is None, scale=scaling
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    if mask is None and causal:
        span = torch.arange(query.shape[2], device=query.device)
        mask = span <= span[:, None]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    probability = scores.float().softmax(-1).to(query.dtype)
    return nn.functional.dropout(probability, dropout) @ value


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
