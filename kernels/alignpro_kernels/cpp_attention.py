"""Backend ``cpp`` of `paged_attention`: csrc/cpu/attention.cpp."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from alignpro_kernels import cpp_head


@functools.cache
def unavailable() -> str | None:
    """Why the backend cannot run here, None if it can; builds the library when it is not there yet."""
    reason = cpp_head.unavailable()  # one library holds the operators of both
    if reason is None:
        _register_fake()
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


def _register_fake() -> None:
    """Shapes of the results, for tracing."""

    @torch.library.register_fake("alignpro::paged_attention")
    def _(query, *rest):  # type: ignore[no-untyped-def]
        return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)
