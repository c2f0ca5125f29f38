"""Backend ``cpp`` of `paged_attention`: csrc/cpu/attention.cpp."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignpro_kernels import cpp_library

if TYPE_CHECKING:
    from alignpro_kernels.attention import CascadeLevel


@functools.cache
def unavailable() -> str | None:
    """Return the reason why the backend cannot run here, or None if it can; builds the library if necessary."""
    reason = cpp_library.unavailable()
    if reason is None:
        _register_fakes()
    return reason


def paged_attention(
    query: Tensor,
    pages: Tensor,
    cu_queries: Tensor,
    page_table: Tensor,
    key_lengths: Tensor,
    query_positions: Tensor,
    key_starts: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `alignpro_kernels.paged_attention`."""
    out, lse = torch.ops.alignpro.paged_attention(
        query,
        pages,
        cu_queries,
        page_table,
        key_lengths,
        query_positions,
        key_starts,
        scale,
        softcap or 0.0,
        window or 0,
    )
    return out, lse


def cascade_attention(
    query: Tensor,
    pages: Tensor,
    levels: Sequence[CascadeLevel],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """See `alignpro_kernels.cascade_attention`."""
    out: Tensor = torch.ops.alignpro.cascade_attention(
        query,
        pages,
        [level.rows for level in levels],
        [level.cu_queries for level in levels],
        [level.page_table for level in levels],
        [level.key_lengths for level in levels],
        [level.query_positions for level in levels],
        [level.key_starts for level in levels],
        scale,
        softcap or 0.0,
        window or 0,
    )
    return out


def _register_fakes() -> None:
    """Register the shapes of the results, for tracing."""

    @torch.library.register_fake("alignpro::cascade_attention")
    def _(query, *rest):  # type: ignore[no-untyped-def]
        return query.new_empty(query.shape)

    @torch.library.register_fake("alignpro::paged_attention")
    def _(query, *rest):  # type: ignore[no-untyped-def]
        return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)
