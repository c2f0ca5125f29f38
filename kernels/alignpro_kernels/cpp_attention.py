"""Backend ``cpp`` of `paged_attention`: csrc/cpu/attention.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignpro_kernels.paged_keys import PagedKeys, by_field


def paged_attention(
    query: Tensor, pages: Tensor, keys: PagedKeys, *, scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """See `alignpro_kernels.paged_attention`."""
    return cascade_attention(query, pages, [keys], scale=scale, softcap=softcap, window=window)


def cascade_attention(
    query: Tensor,
    pages: Tensor,
    levels: Sequence[PagedKeys],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """See `alignpro_kernels.cascade_attention`; also returns the log-sum-exp of the scores, (T, H) float32."""
    out, lse = torch.ops.alignpro.cascade_attention(query, pages, *by_field(levels), scale, softcap or 0.0, window or 0)
    return out, lse
