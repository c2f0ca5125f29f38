"""Backend ``flash`` of `paged_attention`: the kernels of the package flash-attn (FlashAttention-2), if it is installed.

flash-attn takes no positions: its causal mask aligns a sequence's last query with its last key. So there are two cases:

- As many queries as sequences, as in a decode step: each query becomes a sequence of its own, with the keys that it sees.
- More queries than sequences: the queries of each sequence are split into two groups. The first are at the positions of
  the sequence's last keys, in order, for which the causal mask is right; the others come after all its keys and see every
  one. This covers the traversal of a prefix tree. Each group takes one call, in which the queries of the other group have
  no keys. A query that belongs to neither group gets NaN, since an error would require synchronising with the device.

flash-attn counts a window back from the last key, which is wrong for queries that come after it, so windows are not
supported.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from alignpro_kernels.paged_keys import PagedKeys

PAGE_SIZE = 256
"""The number of tokens per page must be a multiple of this."""


def unavailable() -> str | None:
    """Return the reason why the backend cannot run here, or None if it can."""
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "there is no CUDA device"
    if (capability := torch.cuda.get_device_capability()) < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}: flash-attn needs 8.0 (Ampere)"
    return None


def unsupported(query: Tensor, pages: Tensor, window: int | None) -> str | None:
    """Return the reason why the backend does not support these inputs, or None if it does."""
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, and the input is {query.dtype}"
    if pages.shape[2] % PAGE_SIZE:
        return f"it needs a page size that is a multiple of {PAGE_SIZE} tokens, and these pages have {pages.shape[2]}"
    if query.shape[2] % 8 or query.shape[2] > 256:
        return f"it needs a head dimension that is a multiple of 8, at most 256, and this one is {query.shape[2]}"
    if window is not None:
        return "it counts a window from the last key of a sequence, not from the query"
    return None


def paged_attention(
    query: Tensor, pages: Tensor, keys: PagedKeys, *, scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """See `alignpro_kernels.paged_attention`, and the module's docstring for the positions that it supports."""
    assert window is None
    count, sequences, table = len(query), len(keys.key_lengths), keys.page_table
    if not count or not sequences or not table.shape[1]:
        return torch.zeros_like(query), query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
    if query.stride(2) != 1:
        query = query.contiguous()
    bounds = keys.cu_queries.to(query.device, non_blocking=True).contiguous()
    rows = torch.arange(count, dtype=torch.int32, device=query.device)
    owner = torch.searchsorted(bounds, rows, right=True) - 1  # (T,) sequence of each query
    lengths = keys.key_lengths[owner]
    place = keys.query_positions - keys.key_starts[owner]  # (T,) relative to the sequence's first key
    options = {"softmax_scale": scale, "softcap": softcap or 0.0}
    seen = torch.minimum(place + 1, lengths).clamp_min(0)  # (T,) number of keys that each query sees
    if count == sequences:
        out, lse = _one_by_one(query, pages, table[owner], seen, options)
    else:
        inside = (place >= 0) & (place < lengths)
        before = torch.nn.functional.pad(inside.cumsum(0), (1, 0))  # (T + 1,)
        first = (before[bounds[1:]] - before[bounds[:-1]]).int()  # (S,) size of each sequence's first group
        index = rows - bounds[owner]  # (T,) index of each query within its sequence
        in_order = torch.where(index < first[owner], place == lengths - first[owner] + index, ~inside)
        out, lse = _two_kinds(query, pages, bounds, first, table, keys.key_lengths, index < first[owner], options)
        out = torch.where((in_order | (seen == 0))[:, None, None], out, torch.nan)
        lse = torch.where((in_order | (seen == 0))[:, None], lse, torch.nan)
    some = seen > 0
    return torch.where(some[:, None, None], out, 0.0), torch.where(some[:, None], lse, -torch.inf)


def _one_by_one(
    query: Tensor, pages: Tensor, table: Tensor, seen: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Attend with each of the queries (T, H, D) as its own sequence, with ``seen`` keys in the pages of its table row."""
    from flash_attn import flash_attn_with_kvcache

    out, lse = flash_attn_with_kvcache(
        q=query.unsqueeze(1),
        k_cache=pages[:, 0],
        v_cache=pages[:, 1],
        cache_seqlens=seen,
        block_table=table,
        return_softmax_lse=True,
        **options,
    )
    return out.squeeze(1), lse.squeeze(2)  # (T, 1, H, D), (T, H, 1)


def _two_kinds(
    query: Tensor,
    pages: Tensor,
    bounds: Tensor,
    first: Tensor,
    table: Tensor,
    lengths: Tensor,
    is_first: Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Attend with the first queries of each sequence, (S,) counts, under a causal mask, and with the others without one."""
    from flash_attn import flash_attn_varlen_func

    # Each sequence becomes two: its first queries, then the others.
    cu_queries = torch.stack([bounds[:-1], bounds[:-1] + first], 1).flatten()
    cu_queries = torch.cat([cu_queries, bounds[-1:]])  # (2 S + 1,)
    results = []
    for which, causal in enumerate((True, False)):
        keys = torch.stack([lengths if which == kind else torch.zeros_like(lengths) for kind in (0, 1)], 1).flatten()
        out, lse, _ = flash_attn_varlen_func(
            q=query,
            k=pages[:, 0],
            v=pages[:, 1],
            cu_seqlens_q=cu_queries,
            cu_seqlens_k=torch.nn.functional.pad(keys.cumsum(0, dtype=torch.int32), (1, 0)),
            # Upper bounds known from shapes; flash-attn would read 1 as "every sequence has one query".
            max_seqlen_q=max(2, len(query)),
            max_seqlen_k=table.shape[1] * pages.shape[2],
            causal=causal,
            block_table=table.repeat_interleave(2, dim=0),
            return_attn_probs=True,
            **options,
        )
        results.append((out, lse.T))  # (T, H, D), (T, H)
    (out, lse), (others, others_lse) = results
    return torch.where(is_first[:, None, None], out, others), torch.where(is_first[:, None], lse, others_lse)
