"""Attention of tokens to keys and values in a pool, in every layer of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from alignpro_kernels import CascadeLevel, cascade_attention, write_kv


@dataclass
class Cascade:
    """Attention of T tokens over levels of segments, in every layer of a model."""

    layers: Sequence[Tensor]
    """Each layer's pages, (n_pages, 2, page_size, kv_heads, head_dim)."""
    slots: Tensor
    """(T,) int64: where the tokens' own keys and values go; −1 for nowhere."""
    levels: Sequence[CascadeLevel]
    """Depth by depth."""

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
        """As `alignpro.attention.Plan.attend`: puts keys and values away, and attends to all that each token sees."""
        queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
        pages = self.layers[layer]
        write_kv(keys.contiguous(), values.contiguous(), pages, self.slots)
        out = cascade_attention(
            queries,
            pages,
            self.levels,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=softcap,
            window=sliding_window,
        )
        return out.unsqueeze(0)
