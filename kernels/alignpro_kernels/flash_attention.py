"""Backend ``flash`` of `paged_attention`: the libraries of `varlen_kernels` over copies of the keys, for prefill.

Those kernels take no positions: their causal mask aligns a sequence's last query with its last key. So there are two cases:

- As many queries as sequences, as in a decode step: each query becomes a sequence of its own, with the keys that it sees.
- More queries than sequences: the queries of each sequence are split into two groups. The first are at the positions of
  the sequence's last keys, in order, for which the causal mask is right; the others come after all its keys and see every
  one. This covers the traversal of a prefix tree. Each group takes one call, in which the queries of the other group have
  no keys. A query that belongs to neither group gets NaN, since an error would require synchronising with the device.

They count a window back from the last key, which is wrong for queries that come after it, so windows are not supported.

The keys and values of each sequence are first copied from their pages, with zeros behind them. The libraries differ in the
page sizes that they take, and not all of them ignore what is in the unused slots of a page. A prefill reads each copied
key once for every query, so the copy is small beside the attention; what it costs is part of the timed trial.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignpro_kernels import varlen, varlen_kernels
from alignpro_kernels.paged_keys import PagedKeys
from alignpro_kernels.varlen import ScoreOptions, Varlen, VarlenKernels

COPY_LIMIT = 1 << 28
"""The largest copy of keys and values, in bytes. It is as wide for every sequence as for the longest one."""


def unavailable() -> str | None:
    """Return the reason why the backend cannot run here, or None if it can."""
    if varlen_kernels.available():
        return None
    return "; ".join(
        sorted(
            {
                reason
                for kernels in varlen_kernels.KERNELS
                if (reason := varlen_kernels.why_unavailable(kernels)) is not None
            }
        )
    )


def unsupported(
    query: Tensor, pages: Tensor, keys: PagedKeys, softcap: float | None, window: int | None, kernels: VarlenKernels
) -> str | None:
    """Return the reason why a library does not support these inputs, or None if it does."""
    if window is not None:
        return "it counts a window from the last key of a sequence, not from the query"
    size = keys.page_table.numel() * pages[0].numel() * pages.element_size()
    if size > COPY_LIMIT:
        return f"it copies the keys, and these take {size >> 20} MiB, more than {COPY_LIMIT >> 20} MiB"
    return varlen.unsupported(kernels, query, softcap)


def kernels_for(
    query: Tensor, pages: Tensor, keys: PagedKeys, softcap: float | None, window: int | None
) -> tuple[VarlenKernels | None, str]:
    """Return the newest library that supports these inputs, or None and the reason."""
    reason = unavailable() or ""
    for kernels in varlen_kernels.available():
        if (why := unsupported(query, pages, keys, softcap, window, kernels)) is None:
            return kernels, ""
        reason = why
    return None, reason


def paged_attention(
    query: Tensor,
    pages: Tensor,
    keys: PagedKeys,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    kernels: VarlenKernels,
) -> tuple[Tensor, Tensor]:
    """See `alignpro_kernels.paged_attention`, and the module's docstring for the positions that it supports.

    Args:
        query: See there.
        pages: See there.
        keys: See there.
        scale: See there.
        softcap: See there.
        window: None.
        kernels: The library, which supports these inputs.
    """
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
    seen = torch.minimum(place + 1, lengths).clamp_min(0)  # (T,) number of keys that each query sees
    copied = _Copied(pages, keys)

    def attend(bounds: Tensor, owner: Tensor, lengths: Tensor, most: int, *, causal: bool) -> tuple[Tensor, Tensor]:
        call = copied.varlen(bounds, owner, lengths, most, causal=causal)
        return kernels.forward(query, copied.keys, copied.values, call, ScoreOptions(scale, softcap))

    if count == sequences:
        own = torch.arange(count + 1, dtype=torch.int32, device=query.device)
        out, lse = attend(own, owner, seen, 1, causal=False)
    else:
        inside = (place >= 0) & (place < lengths)
        before = torch.nn.functional.pad(inside.cumsum(0), (1, 0))  # (T + 1,)
        first = (before[bounds[1:]] - before[bounds[:-1]]).int()  # (S,) size of each sequence's first group
        index = rows - bounds[owner]  # (T,) index of each query within its sequence
        is_first = index < first[owner]
        in_order = torch.where(is_first, place == lengths - first[owner] + index, ~inside)
        # Each sequence becomes two: its first queries, then the others.
        split = torch.cat([torch.stack([bounds[:-1], bounds[:-1] + first], 1).flatten(), bounds[-1:]])  # (2 S + 1,)
        owner = torch.arange(sequences, device=query.device).repeat_interleave(2)
        none = torch.zeros_like(keys.key_lengths)
        groups = []
        for causal in (True, False):
            both = (keys.key_lengths, none) if causal else (none, keys.key_lengths)
            groups.append(attend(split, owner, torch.stack(both, 1).flatten(), count, causal=causal))
        (out, lse), (others, others_lse) = groups
        out = torch.where(is_first[:, None, None], out, others)
        lse = torch.where(is_first[:, None], lse, others_lse)
        out = torch.where((in_order | (seen == 0))[:, None, None], out, torch.nan)
        lse = torch.where((in_order | (seen == 0))[:, None], lse, torch.nan)
    some = seen > 0
    return torch.where(some[:, None, None], out, 0.0), torch.where(some[:, None], lse, -torch.inf)


class _Copied:
    """The keys and values of S sequences, copied from their pages one after the other, each to the same length L."""

    def __init__(self, pages: Tensor, keys: PagedKeys) -> None:
        size, table = pages.shape[2], keys.page_table.long()
        self.length = table.shape[1] * size
        at = torch.arange(self.length, device=pages.device)
        unused = at >= keys.key_lengths[:, None]  # (S, L)
        page = table[:, at // size].masked_fill(unused, 0)  # entries beyond a sequence's keys may be anything
        self.keys, self.values = (
            pages[page, which, at % size].masked_fill_(unused[:, :, None, None], 0.0).flatten(0, 1) for which in (0, 1)
        )
        """(S·L, kv_heads, D) each."""

    def varlen(self, bounds: Tensor, owner: Tensor, lengths: Tensor, most: int, *, causal: bool) -> Varlen:
        """A call in which each range of queries sees the first ``lengths`` keys of the sequence ``owner``."""
        starts = torch.nn.functional.pad(owner.int() * self.length, (0, 1))
        return Varlen(bounds, starts, most, self.length, causal, lengths.int().contiguous())
