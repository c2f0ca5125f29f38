"""Backend ``triton`` of `paged_attention`: CUDA and ROCm devices, and CPU tensors if TRITON_INTERPRET=1 is set.

A program computes one key-value head and a tile of rows. The rows are the queries of one sequence, each with the G query
heads that read the key-value head, so that tiles are well filled in a decode step too. The keys are gathered through the
page table, one block at a time. The grid depends only on shapes, and the host reads no values: the launch never
synchronises, and values (lengths, page numbers) are not checked. If few programs would read many keys, the keys are
split into pieces of a fixed size, whose results a second kernel merges in order.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alignpro_kernels import triton_configs
from alignpro_kernels.paged_keys import PagedKeys
from alignpro_kernels.triton_configs import COMBINE, COMPILE_OPTIONS, SEQUENCE_BLOCK, attention_tile
from alignpro_kernels.triton_product import downcast, exp, finite, multiply, tanh
from alignpro_kernels.triton_support import device_guard, supports


@triton.jit(do_not_specialize=["sequences", "max_keys", "split_keys"])
def attention_kernel(
    query,  # (T, H, D)
    pages,  # (n_pages, 2, PAGE, kv_heads, D)
    out,  # (splits, T, H, D) out
    lses,  # (splits, T, H) out, float32
    cu_queries,  # (S + 1,)
    page_table,  # (S, max_pages)
    key_lengths,  # (S,)
    query_positions,  # (T,)
    key_starts,  # (S,)
    scale,
    softcap,  # or None
    window,  # or None
    sequences,
    max_keys,
    split_keys,  # keys per split, a multiple of BK
    query_stride,
    query_head_stride,
    page_stride,
    value_stride,
    slot_stride,
    head_stride,
    table_stride,
    table_step,
    rows_all,  # T·H
    D: tl.constexpr,
    G: tl.constexpr,
    PAGE: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of BR rows of one sequence, which has G rows per query; its first tile is given by `first_tile`."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.zeros((BS,), tl.int32)
    for first in range(0, sequences, BS):
        s = first + tl.arange(0, BS)
        begin = tl.load(cu_queries + s, mask=s < sequences, other=0)
        sequence += ((s < sequences) & (first_tile(begin, s, G, BR) <= tile)).to(tl.int32)
    sequence = tl.sum(sequence, 0) - 1  # the last one that starts at or before this tile
    begin = tl.load(cu_queries + sequence)
    count = tl.load(cu_queries + sequence + 1) - begin
    row = (tile - first_tile(begin, sequence, G, BR)) * BR + tl.arange(0, BR)
    if (tile - first_tile(begin, sequence, G, BR)) * BR >= count * G:
        return  # an unused tile, from rounding up
    valid = row < count * G
    at = tl.where(valid, begin + row // G, begin)
    head = kv_head * G + row % G

    length = tl.minimum(tl.load(key_lengths + sequence), max_keys)
    position = tl.load(query_positions + at) - tl.load(key_starts + sequence)  # relative to the sequence's first key
    last = tl.where(valid, tl.minimum(position, length - 1), -1)  # the last key that each row sees
    lowest = tl.program_id(2) * split_keys
    end = tl.minimum(tl.max(last, 0) + 1, lowest + split_keys)
    if window is not None:
        lowest = tl.maximum(lowest, (tl.min(position, 0) - window + 1) // BK * BK)

    column = tl.arange(0, BD)
    inside = column < D
    pointers = at.to(tl.int64) * query_stride + head * query_head_stride
    q = tl.load(query + pointers[:, None] + column[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
    table = page_table + sequence.to(tl.int64) * table_stride
    states = pages + kv_head.to(tl.int64) * head_stride + column[None, :]

    top = tl.full((BR,), float("-inf"), tl.float32)
    total = tl.zeros((BR,), tl.float32)
    acc = tl.zeros((BR, BD), tl.float32)
    for first in range(lowest, end, BK):
        key = first + tl.arange(0, BK)
        known = key < end
        seen = key[None, :] <= last[:, None]
        wanted = known
        if window is not None:
            seen = seen & (key[None, :] > (position - window)[:, None])
            wanted = tl.max(seen.to(tl.int32), 0) > 0  # unseen values may be NaN, and 0 · NaN is NaN
        page = tl.load(table + (key // PAGE).to(tl.int64) * table_step, mask=known, other=0)
        slot = page.to(tl.int64) * page_stride + (key % PAGE) * slot_stride
        k = tl.load(states + slot[:, None], mask=known[:, None] & inside[None, :], other=0.0)
        v = tl.load(states + (slot + value_stride)[:, None], mask=wanted[:, None] & inside[None, :], other=0.0)
        z = multiply(q, tl.trans(k), tl.zeros((BR, BK), tl.float32), PRECISION) * scale
        if softcap is not None:
            z = softcap * tanh(z / softcap)
        z = tl.where(seen, z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, 1))
        decay = exp(top - finite(higher))
        p = exp(z - finite(higher)[:, None])
        total = total * decay + tl.sum(p, 1)
        acc = multiply(downcast(p, pages.dtype.element_ty), v, acc * decay[:, None], PRECISION)
        top = higher

    target = tl.program_id(2).to(tl.int64) * rows_all + at.to(tl.int64) * (tl.num_programs(1) * G) + head
    lse = tl.where(total == 0.0, float("-inf"), finite(top) + tl.log(total))
    tl.store(lses + target, lse, mask=valid)
    # The outputs of a split without keys are never read, except those of the first, which may be the only split.
    read = row < tl.where((lowest < end) | (tl.program_id(2) == 0), count * G, 0)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    pointers = out + target[:, None] * D + column[None, :]
    tl.store(pointers, downcast(acc, out.dtype.element_ty), mask=read[:, None] & inside[None, :])


@triton.jit
def first_tile(begin, sequence, G: tl.constexpr, BR: tl.constexpr):
    """Return a sequence's first tile, given its first query; each sequence has one spare tile if BR does not divide G."""
    if G % BR == 0:
        return begin * (G // BR)
    return begin * G // BR + sequence


@triton.jit(do_not_specialize=["rows", "splits"])
def combine_kernel(
    partial_outs,  # (splits, rows, D) float32
    partial_lses,  # (splits, rows) float32
    out,  # (rows, D) out
    lses,  # (rows,) out
    rows,
    splits,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Compute Σ softmax(lse) · out over the splits, in order, and their joint log-sum-exp, for BR rows."""
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    column = tl.arange(0, BD)
    valid = row < rows
    top = tl.full((BR,), float("-inf"), tl.float32)
    for i in range(splits):
        top = tl.maximum(top, tl.load(partial_lses + rows.to(tl.int64) * i + row, mask=valid, other=float("-inf")))
    total = tl.zeros((BR,), tl.float32)
    acc = tl.zeros((BR, BD), tl.float32)
    for i in range(splits):
        pointers = rows.to(tl.int64) * i + row
        lse = tl.load(partial_lses + pointers, mask=valid, other=float("-inf"))
        weight = exp(lse - finite(top))
        mask = (valid & (lse != float("-inf")))[:, None] & (column < D)[None, :]
        acc += weight[:, None] * tl.load(partial_outs + pointers[:, None] * D + column[None, :], mask=mask, other=0.0)
        total += weight
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(lses + row, tl.where(total == 0.0, float("-inf"), finite(top) + tl.log(total)), mask=valid)
    pointers = out + row[:, None] * D + column[None, :]
    tl.store(pointers, downcast(acc, out.dtype.element_ty), mask=valid[:, None] & (column < D)[None, :])


def paged_attention(
    query: Tensor, pages: Tensor, keys: PagedKeys, *, scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """See `alignpro_kernels.paged_attention`."""
    assert supports(query.device), query.device
    count, heads, dim = query.shape
    page_size, kv_heads = pages.shape[2:4]
    device, group, sequences = query.device, heads // kv_heads, len(keys.key_lengths)
    out = query.new_empty(query.shape)
    lse = torch.empty(count, heads, dtype=torch.float32, device=device)
    if not count or not sequences:
        return out, lse
    if query.stride(2) != 1 and dim > 1:
        query = query.contiguous()
    tile = attention_tile(
        query.dtype, dim, triton.cdiv(count, sequences) * group, plain=softcap is None and window is None
    )
    tiles = count * group // tile.rows + (0 if group % tile.rows == 0 else sequences)
    max_keys = keys.page_table.shape[1] * page_size
    splits, split_keys = _splits(device, tiles * kv_heads, max_keys, tile.keys)
    partial_out, partial_lse = out, lse
    if splits > 1:
        partial_out = torch.empty(splits, count, heads, dim, dtype=torch.float32, device=device)
        partial_lse = torch.empty(splits, count, heads, dtype=torch.float32, device=device)
    with device_guard(device):
        attention_kernel[(tiles, kv_heads, splits)](
            query,
            pages,
            partial_out,
            partial_lse,
            keys.cu_queries.to(device, non_blocking=True).contiguous(),
            keys.page_table,
            keys.key_lengths.contiguous(),
            keys.query_positions.contiguous(),
            keys.key_starts.contiguous(),
            float(scale),
            None if softcap is None else float(softcap),
            None if window is None else min(window, 1 << 30),  # larger than any position
            sequences,
            max_keys,
            split_keys,
            *query.stride()[:2],
            *pages.stride()[:4],
            *keys.page_table.stride(),
            count * heads,
            D=dim,
            G=group,
            PAGE=page_size,
            BR=tile.rows,
            BK=tile.keys,
            BD=tile.width,
            BS=SEQUENCE_BLOCK,
            PRECISION="ieee",
            num_warps=tile.warps,
            num_stages=tile.stages,
            **COMPILE_OPTIONS,
        )
        if splits > 1:
            combine_kernel[(triton.cdiv(count * heads, COMBINE["BR"]),)](
                partial_out,
                partial_lse,
                out,
                lse,
                count * heads,
                splits,
                D=dim,
                BD=tile.width,
                **COMBINE,
                **COMPILE_OPTIONS,
            )
    return out, lse


def _splits(device: torch.device, programs: int, max_keys: int, block: int) -> tuple[int, int]:
    """Return the number of splits and the keys per split, a multiple of a block; depends only on shapes."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    if programs >= triton_configs.SPLIT_WAVES * processors:
        return 1, max(block, triton.cdiv(max_keys, block) * block)
    shortest = triton.cdiv(triton.cdiv(max_keys, triton_configs.MAX_SPLITS), block) * block
    split_keys = max(triton_configs.SPLIT_KEYS, shortest)
    return max(1, triton.cdiv(max_keys, split_keys)), split_keys
