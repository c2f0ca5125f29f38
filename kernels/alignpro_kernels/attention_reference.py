"""The specification of `paged_attention`, in plain PyTorch: what every backend must compute.

    z_j = scale · q · k_j, with a soft-cap softcap · tanh(z_j / softcap), over the keys j that the query sees
    out = Σ_j softmax(z)_j v_j      lse = log Σ_j exp z_j

Each sequence's keys are gathered and all its scores are materialised, in float32 (float64 for float64 inputs). The public
operator has checked the shapes of the arguments. Their values are checked here, because this backend copies them to the
host anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignpro_kernels.head import upcast
from alignpro_kernels.paged_keys import PagedKeys


def paged_attention(
    query: Tensor, pages: Tensor, keys: PagedKeys, *, scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """See `alignpro_kernels.paged_attention`."""
    bounds, lengths, starts = keys.cu_queries.tolist(), keys.key_lengths.tolist(), keys.key_starts.tolist()
    _check_values(query, pages, bounds, keys.page_table, lengths)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)  # (T, H, D)
    lse = upcast(query).new_full(query.shape[:2], -torch.inf)  # (T, H)
    for s, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        rows = slice(bounds[s], bounds[s + 1])
        if rows.start == rows.stop or length == 0:
            continue
        k, v = _gather(pages, keys.page_table[s], length)  # (kv_heads, length, D)
        positions = torch.arange(start, start + length, device=query.device)
        distance = keys.query_positions[rows, None].long() - positions  # (rows, length)
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        out[rows], lse[rows] = _attention(query[rows], k, v, seen, scale, softcap)
    return out, lse


def _gather(pages: Tensor, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values of one sequence, each (kv_heads, length, D)."""
    slot = torch.arange(length, device=pages.device)
    page, offset = table.long()[slot // pages.shape[2]], slot % pages.shape[2]
    both = upcast(pages[page, :, offset])  # (length, 2, kv_heads, D)
    keys, values = both.permute(1, 2, 0, 3)
    return keys, values


def _attention(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """query (n, H, D), keys and values (kv_heads, length, D), seen (n, length) -> (n, H, D), (n, H)."""
    n, heads, dim = query.shape
    grouped = upcast(query).view(n, len(keys), -1, dim)  # (n, kv_heads, group, D)
    z = scale * torch.einsum("nkgd,kld->kgnl", grouped, keys)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z.masked_fill(~seen, -torch.inf)
    lse = z.logsumexp(-1)  # (kv_heads, group, n)
    p = (z - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    values = values.masked_fill(~seen.any(0).unsqueeze(-1), 0.0)  # unseen values may be NaN, and 0 · NaN is NaN
    out = torch.einsum("kgnl,kld->nkgd", p, values).reshape(n, heads, dim)
    return out.to(query.dtype), lse.permute(2, 0, 1).reshape(n, heads)


def _check_values(query: Tensor, pages: Tensor, bounds: list[int], page_table: Tensor, lengths: list[int]) -> None:
    if bounds[0] != 0 or bounds[-1] != len(query):
        raise ValueError(
            f"cu_queries goes from {bounds[0]} to {bounds[-1]}: expected from 0 to the number of queries, {len(query)}"
        )
    slots = page_table.shape[1] * pages.shape[2]
    for s, length in enumerate(lengths):
        if bounds[s] > bounds[s + 1]:
            raise ValueError(f"cu_queries: sequence {s} goes from {bounds[s]} to {bounds[s + 1]}: it must not decrease")
        if not 0 <= length <= slots:
            raise ValueError(f"key_lengths: sequence {s} has {length} keys, expected 0 to {slots}, what its pages hold")
        for i, page in enumerate(page_table[s, : -(-length // pages.shape[2])].tolist()):
            if not 0 <= page < len(pages):
                raise ValueError(f"page_table: entry {i} of sequence {s} is {page}, expected 0 to {len(pages) - 1}")
