"""Attention of tokens to keys and values in a paged pool, in every layer of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from alignpro_kernels import PagedKeys, cascade_attention, write_kv


@dataclass
class Cascade:
    """Cascade attention of T tokens, in every layer of a model."""

    layers: Sequence[Tensor]
    """Each layer's pages, (n_pages, 2, page_size, kv_heads, head_dim)."""
    slots: Tensor
    """(T,) int64: the slot each token's key and value are written to; −1 to write nothing."""
    levels: Sequence[PagedKeys]
    """One per depth of the prefix tree."""

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
        """See `alignpro.attention.Plan.attend`: write keys and values to the pool, then attend over all levels."""
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
