"""Backend ``triton`` of `paged_attention`: CUDA and ROCm devices, and CPU tensors if TRITON_INTERPRET=1 is set.

A program computes one key-value head and a tile of rows. The rows are the queries of one sequence, each with the G query
heads that read the key-value head, so that tiles are well filled in a decode step too. The keys are gathered through the
page table, one block at a time. The grid depends only on shapes, and the host reads no values: the launch never
synchronises, and values (lengths, page numbers) are not checked. If few programs would read many keys, the keys are
split into parts of a fixed size, whose results a second kernel merges in order.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from alignpro_kernels.triton_configs import COMPILE_OPTIONS, max_stages
from alignpro_kernels.triton_product import downcast, exp, finite, multiply, tanh
from alignpro_kernels.triton_support import interpreting, on, takes

_PART = 16 if interpreting() else 512
"""Keys per part: few enough that one sequence of a few thousand keys occupies the device."""
_MOST_PARTS = 64  # beyond this, parts become longer instead: each part stores its results in memory
_WAVES = 2  # with at least this many programs per processor, keys are not split


@triton.jit(do_not_specialize=["sequences", "most_keys", "part"])
def attention_kernel(
    query,  # (T, H, D)
    pages,  # (n_pages, 2, PAGE, kv_heads, D)
    out,  # (parts, T, H, D) out
    lses,  # (parts, T, H) out, float32
    cu_queries,  # (S + 1,)
    page_table,  # (S, max_pages)
    key_lengths,  # (S,)
    query_positions,  # (T,)
    key_starts,  # (S,) or None
    scale,
    softcap,  # or None
    window,  # or None
    sequences,
    most_keys,
    part,  # keys per part, a multiple of BK
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
    """Attention of BR rows of one sequence, which has G rows per query; its first tile is given by `tile_of`."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.zeros((BS,), tl.int32)
    for first in range(0, sequences, BS):
        s = first + tl.arange(0, BS)
        begin = tl.load(cu_queries + s, mask=s < sequences, other=0)
        sequence += ((s < sequences) & (tile_of(begin, s, G, BR) <= tile)).to(tl.int32)
    sequence = tl.sum(sequence, 0) - 1  # the last one that starts at or before this tile
    begin = tl.load(cu_queries + sequence)
    count = tl.load(cu_queries + sequence + 1) - begin
    row = (tile - tile_of(begin, sequence, G, BR)) * BR + tl.arange(0, BR)
    if (tile - tile_of(begin, sequence, G, BR)) * BR >= count * G:
        return  # an unused tile, from rounding up
    valid = row < count * G
    at = tl.where(valid, begin + row // G, begin)
    head = kv_head * G + row % G

    length = tl.minimum(tl.load(key_lengths + sequence), most_keys)
    position = tl.load(query_positions + at)
    if key_starts is not None:
        position -= tl.load(key_starts + sequence)  # relative to the sequence's first key
    last = tl.where(valid, tl.minimum(position, length - 1), -1)  # the last key that each row sees
    lowest = tl.program_id(2) * part
    end = tl.minimum(tl.max(last, 0) + 1, lowest + part)
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
    # The outputs of a part without keys are never read, except those of the first, which may be the only part.
    read = row < tl.where((lowest < end) | (tl.program_id(2) == 0), count * G, 0)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    pointers = out + target[:, None] * D + column[None, :]
    tl.store(pointers, downcast(acc, out.dtype.element_ty), mask=read[:, None] & inside[None, :])


@triton.jit
def tile_of(begin, sequence, G: tl.constexpr, BR: tl.constexpr):
    """Return a sequence's first tile, given its first query; each sequence has one spare tile if BR does not divide G."""
    if G % BR == 0:
        return begin * (G // BR)
    return begin * G // BR + sequence


@triton.jit(do_not_specialize=["rows", "parts"])
def join_kernel(
    partial_outs,  # (parts, rows, D) float32
    partial_lses,  # (parts, rows) float32
    out,  # (rows, D) out
    lses,  # (rows,) out
    rows,
    parts,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Compute Σ softmax(lse) · out over the parts, in order, and their joint log-sum-exp, for BR rows."""
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    column = tl.arange(0, BD)
    valid = row < rows
    top = tl.full((BR,), float("-inf"), tl.float32)
    for i in range(parts):
        top = tl.maximum(top, tl.load(partial_lses + rows.to(tl.int64) * i + row, mask=valid, other=float("-inf")))
    total = tl.zeros((BR,), tl.float32)
    acc = tl.zeros((BR, BD), tl.float32)
    for i in range(parts):
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


@dataclass(frozen=True)
class Tile:
    """Rows and keys per program, and how it is compiled."""

    rows: int
    keys: int
    width: int
    """D rounded up to a power of two."""
    warps: int
    stages: int


def tile(dtype: torch.dtype, dim: int, rows: int, *, plain: bool) -> Tile:
    """Choose the tile for ``rows`` rows (queries times heads) per sequence; plain: no soft-cap or window, which use registers."""
    width = max(16, triton.next_power_of_2(dim))
    if dtype == torch.float32:  # without tensor cores, which would need fewer registers
        most, keys = (32, 32) if width <= 64 else (16, 16)
    elif width <= 128:
        most, keys = 128, 64 if plain else 32
    elif width <= 256:
        most, keys = 64 if plain else 32, 32
    else:
        most, keys = 16, 16
    if interpreting():
        most, keys = 16, 16
    select_column = min(most, max(16, triton.next_power_of_2(rows)))
    return Tile(select_column, keys, width, 8 if select_column >= 64 else 4, 2 if dtype == torch.float32 else 3)


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
    assert takes(query.device), query.device
    count, heads, dim = query.shape
    page_size, kv_heads = pages.shape[2:4]
    device, group, sequences = query.device, heads // kv_heads, len(key_lengths)
    out = query.new_empty(query.shape)
    lse = torch.empty(count, heads, dtype=torch.float32, device=device)
    if not count or not sequences:
        return out, lse
    if query.stride(2) != 1 and dim > 1:
        query = query.contiguous()
    shape = tile(query.dtype, dim, triton.cdiv(count, sequences) * group, plain=softcap is None and window is None)
    tiles = count * group // shape.rows + (0 if group % shape.rows == 0 else sequences)
    most_keys = page_table.shape[1] * page_size
    parts, part = _parts(device, tiles * kv_heads, most_keys, shape.keys)
    partial_out, partial_lse = out, lse
    if parts > 1:
        partial_out = torch.empty(parts, count, heads, dim, dtype=torch.float32, device=device)
        partial_lse = torch.empty(parts, count, heads, dtype=torch.float32, device=device)
    stages = min(shape.stages, max_stages(torch.version.hip is not None))
    with on(device):
        attention_kernel[(tiles, kv_heads, parts)](
            query,
            pages,
            partial_out,
            partial_lse,
            cu_queries.to(device, non_blocking=True).contiguous(),
            page_table,
            key_lengths.contiguous(),
            query_positions.contiguous(),
            None if key_starts is None else key_starts.contiguous(),
            float(scale),
            None if softcap is None else float(softcap),
            None if window is None else min(window, 1 << 30),  # larger than any position
            sequences,
            most_keys,
            part,
            *query.stride()[:2],
            *pages.stride()[:4],
            *page_table.stride(),
            count * heads,
            D=dim,
            G=group,
            PAGE=page_size,
            BR=shape.rows,
            BK=shape.keys,
            BD=shape.width,
            BS=128,
            PRECISION="ieee",
            num_warps=shape.warps,
            num_stages=stages,
            **COMPILE_OPTIONS,
        )
        if parts > 1:
            join_kernel[(triton.cdiv(count * heads, 4),)](
                partial_out, partial_lse, out, lse, count * heads, parts, D=dim, BR=4, BD=shape.width, **COMPILE_OPTIONS
            )
    return out, lse


def _parts(device: torch.device, programs: int, most_keys: int, block: int) -> tuple[int, int]:
    """Return the number of parts and the keys per part, a multiple of a block; depends only on shapes."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    if programs >= _WAVES * processors:
        return 1, max(block, triton.cdiv(most_keys, block) * block)
    part = max(_PART, triton.cdiv(triton.cdiv(most_keys, _MOST_PARTS), block) * block)
    return max(1, triton.cdiv(most_keys, part)), part
