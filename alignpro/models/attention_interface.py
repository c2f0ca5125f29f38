"""Attention other than a model's own, inside unmodified transformers models.

`install_attention` registers an attention function with transformers' `AttentionInterface`. If the forward call has an
`AttentionBackend` among its keyword arguments, this function delegates to it: packed sequences (`packed_attention`), keys
and values in a paged pool (`paged_attention`). Without one, it calls the model's original attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_PREFIX = "alignpro_"


@dataclass(frozen=True)
class AttentionSettings:
    """How a layer computes its attention."""

    scale: float
    """Scale of the scores."""
    softcap: float | None = None
    """Scores become softcap · tanh(score / softcap)."""
    sliding_window: int | None = None
    """Number of tokens, itself included, that a token attends to."""
    dropout: float = 0.0
    """Dropout rate of the attention probabilities; generation has none."""


class AttentionBackend(Protocol):
    """Computes the attention of every layer of a model in a forward pass."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """Compute the attention of T new tokens in one layer.

        Args:
            layer: Index of the layer.
            query: (1, H, T, D).
            key: (1, H', T, D), H a multiple of H'.
            value: As ``key``.
            settings: How the layer computes its attention.

        Returns:
            (1, T, H, D).
        """


def install_attention(model: PreTrainedModel) -> None:
    """Make a model's forward pass accept ``attention_backend=``; without one it behaves as before.

    Raises:
        ValueError: The model's attention does not go through transformers' interface.
    """
    original = model.config._attn_implementation
    if original.startswith(_PREFIX):
        return
    name = _PREFIX + original
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _attention_function(original))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ValueError("its attention does not go through transformers' AttentionInterface")


def _attention_function(original: str) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        attention_backend: AttentionBackend | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if attention_backend is None and original != "eager":
            function = ALL_ATTENTION_FUNCTIONS[original]
            result: tuple[Tensor, None] = function(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
            )
            return result
        scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        settings = AttentionSettings(scale, options.get("softcap"), options.get("sliding_window"), dropout)
        if options.get("s_aux") is not None:
            raise ValueError("attention sinks are not supported")
        if attention_backend is None:  # transformers defines eager attention in each model's own file
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
            mask = attention_mask[..., : key.shape[2]] if attention_mask is not None else None
            return dot_product_attention(query, key, value, mask, settings).transpose(1, 2).contiguous(), None
        layer: Any = module.layer_idx
        return attention_backend.attend(layer, query, key, value, settings), None

    return attention


def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: AttentionSettings,
    *,
    causal: bool = False,
) -> Tensor:
    """Compute softmax(scores) · value of heads that are as many in all arguments; a sliding window is up to the mask.

    Args:
        query: (B, H, Q, D).
        key: (B, H, K, D).
        value: As ``key``.
        mask: (B or 1, H or 1, Q, K), bool or added to the scores; overrides ``causal``.
        settings: How the layer computes its attention.
        causal: Whether query i attends to the keys up to i.

    Returns:
        (B, H, Q, D), differentiable.
    """
    if settings.softcap is None:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, mask, settings.dropout, is_causal=causal and mask is None, scale=settings.scale
        )
    scores = settings.softcap * torch.tanh(query @ key.transpose(2, 3) * (settings.scale / settings.softcap))
    if mask is None and causal:
        span = torch.arange(query.shape[2], device=query.device)
        mask = span <= span[:, None]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    probability = scores.float().softmax(-1).to(query.dtype)
    return nn.functional.dropout(probability, settings.dropout) @ value
