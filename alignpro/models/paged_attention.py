"""Attention of tokens to keys and values in a paged pool, in every layer of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from alignpro.models.attention_interface import AttentionSettings
from alignpro_kernels import PagedKeys, cascade_attention, write_kv


@dataclass
class PagedAttention:
    """An `AttentionBackend` that writes the keys and values of T tokens to the pool, then attends over cascade levels."""

    layers: Sequence[Tensor]
    """Each layer's pages, (n_pages, 2, page_size, kv_heads, head_dim)."""
    slots: Tensor
    """(T,) int64: the slot each token's key and value are written to; −1 to write nothing."""
    levels: Sequence[PagedKeys]
    """One per depth of the prefix tree."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """See `AttentionBackend.attend`."""
        queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
        pages = self.layers[layer]
        write_kv(keys.contiguous(), values.contiguous(), pages, self.slots)
        out = cascade_attention(
            queries,
            pages,
            self.levels,
            scale=settings.scale,
            softcap=settings.softcap,
            window=settings.sliding_window,
        )
        return out.unsqueeze(0)
