"""Kernels that compute a chunk's logits with their statistics in one pass, and merge the statistics of tiles.

For a row and a tile of the vocabulary, relative to the tile's maxima m of z and m_r of the reference's z_r:

    s = Σ e^{z−m}         a = Σ e^{z−m}(z−m)             b = Σ e^{z−m}((z−m) − (z_r−m_r))
    s_r = Σ e^{z_r−m_r}   a_r = Σ e^{z_r−m_r}(z_r−m_r)

Relative to the row's maxima M and M_r, they are summed over the tiles. Then, without cancellation of large numbers,

    log p_y = (z_y − M) − log s      H = log s − a/s      KL = b/s − log s + log s_r

For the gradient, z − m − a/s is stored in the inputs' dtype: m + a/s is the tile's mean logit under its own distribution,
so that the rounding error, which is relative, is small where the probability mass is.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from alignpro_kernels.triton_configs import LOGITS, prune_logits_configs
from alignpro_kernels.triton_product import (
    downcast,
    exp,
    finite,
    logits,
    mean,
    moment,
    mul_or_zero,
    product,
    row_temperature,
    shared_product,
    split_columns,
    tile_position,
)


@triton.autotune(
    LOGITS,
    key=["rows_key", "vocabulary", "softcap", "D", "REF_D", "SHARED", "R"],
    prune_configs_by={"early_config_prune": prune_logits_configs},
    cache_results=True,
)
@triton.jit(do_not_specialize=["rows", "rows_key"])
def logits_kernel(
    hidden,  # (C, D)
    weight,  # (V, D)
    bias,  # (V,) | None
    lora_hidden,  # (C, R) | None
    lora_b,  # (V, R) | None
    ref_hidden,  # (C, REF_D) | None
    ref_weight,  # (V, REF_D) | None
    ref_bias,  # (V,) | None
    temperatures,  # (C,) float32 | None
    target,  # (C,) int64
    target_logit,  # (C,) float32, out
    partials,  # (m, s, a[, m_r, s_r, a_r, b]; tiles, C) float32, out
    width,  # (1,) int32, out: BN, chosen by tuning
    saved,  # (C, kept_stride) | None, out: z − m − a/s
    ref_saved,  # (C, kept_stride) | None, out: z_r − m_r − a_r/s_r
    rows,
    vocabulary,
    saved_stride,
    plane_stride,
    temperature,
    softcap,  # float | None
    rows_key,  # rows rounded, for tuning only
    D: tl.constexpr,
    REF_D: tl.constexpr,  # 0 without a reference
    SHARED: tl.constexpr,  # ref_weight is weight
    R: tl.constexpr,  # 0 without a low-rank part
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    WAVES: tl.constexpr,  # persistent programs per processor, which loop over tiles; 0: one program per tile
):
    """Compute logits and statistics of BM rows over BN vocabulary entries, per program or iteration of a persistent one."""
    INFINITE: tl.constexpr = bias is not None or ref_bias is not None
    row_tiles = tl.cdiv(rows, BM)
    column_tiles = tl.cdiv(vocabulary, BN)
    if tl.program_id(0) == 0:
        tl.store(width, BN)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = tile_position(tile, row_tiles, column_tiles, GROUP)
        row = row_tile * BM + tl.arange(0, BM)
        valid = row < rows
        # Rows and columns beyond the end repeat the last one, so that loads need no mask; they are not stored.
        row = tl.minimum(row, rows - 1)
        column = column_tile * BN + tl.arange(0, BN)
        clamped = tl.minimum(column, vocabulary - 1).to(tl.int64)  # C·V and V·D may exceed 2³¹
        long_row = row.to(tl.int64)

        a = hidden + long_row * D
        b = weight + clamped * D
        u = tl.zeros((BM, BN), tl.float32)
        if SHARED:
            u_ref = tl.zeros((BM, BN), tl.float32)
            u, u_ref = shared_product(u, u_ref, a, ref_hidden + long_row * D, b, D, BK, PRECISION)
        else:
            u = product(u, a, b, D, BK, PRECISION)
        if R > 0:
            RANK: tl.constexpr = 16 if R <= 16 else 32
            u = product(u, lora_hidden + long_row * R, lora_b + clamped * R, R, RANK, PRECISION)

        if REF_D > 0 and not SHARED:
            u_ref = tl.zeros((BM, BN), tl.float32)
            u_ref = product(u_ref, ref_hidden + long_row * REF_D, ref_weight + clamped * REF_D, REF_D, BK, PRECISION)
        scale = 1.0 / row_temperature(temperatures, temperature, row, valid)
        left_first = column_tile * BN
        right_first = left_first + BN // 2
        left = left_first + tl.arange(0, BN // 2)
        right = right_first + tl.arange(0, BN // 2)
        left_u, right_u = split_columns(u)
        left_z = logits(left_u, bias, left_first, vocabulary, softcap, scale)
        right_z = logits(right_u, bias, right_first, vocabulary, softcap, scale)

        wanted = tl.load(target + row).to(tl.int32)
        here = (wanted >= left_first) & (wanted < left_first + BN)
        if tl.max(here.to(tl.int32), 0) > 0:  # few tiles contain a target
            found = select_column(left_z, left, wanted) + select_column(right_z, right, wanted)
            tl.store(target_logit + row, found, mask=valid & here)

        plane = partials + column_tile.to(tl.int64) * rows + row
        corner = (row_tile * BM).to(tl.int64) * saved_stride + column_tile * BN  # C·V may exceed 2³¹
        offset = tl.arange(0, BM)[:, None] * saved_stride + tl.arange(0, BN // 2)[None, :]
        left_inside = valid[:, None] & (left < vocabulary)[None, :]
        right_inside = valid[:, None] & (right < vocabulary)[None, :]
        top, left_d, right_d = subtract_max(left_z, right_z)
        left_e = exp(left_d)
        right_e = exp(right_d)
        middle = store_sums(plane, plane_stride, valid, top, left_d, right_d, left_e, right_e, INFINITE)
        if saved is not None:
            pointers = saved + corner + offset
            tl.store(pointers, downcast(left_d - middle[:, None], saved.dtype.element_ty), mask=left_inside)
            tl.store(pointers + BN // 2, downcast(right_d - middle[:, None], saved.dtype.element_ty), mask=right_inside)
        if REF_D > 0:
            left_u, right_u = split_columns(u_ref)
            left_z = logits(left_u, ref_bias, left_first, vocabulary, softcap, scale)
            right_z = logits(right_u, ref_bias, right_first, vocabulary, softcap, scale)
            top, left_ref, right_ref = subtract_max(left_z, right_z)
            b = moment(left_e, left_d - left_ref, INFINITE) + moment(right_e, right_d - right_ref, INFINITE)
            tl.store(plane + 6 * plane_stride, b, mask=valid)
            left_e = exp(left_ref)
            right_e = exp(right_ref)
            plane += 3 * plane_stride
            middle = store_sums(plane, plane_stride, valid, top, left_ref, right_ref, left_e, right_e, INFINITE)
            if ref_saved is not None:
                pointers = ref_saved + corner + offset
                tl.store(pointers, downcast(left_ref - middle[:, None], saved.dtype.element_ty), mask=left_inside)
                tl.store(
                    pointers + BN // 2, downcast(right_ref - middle[:, None], saved.dtype.element_ty), mask=right_inside
                )


@triton.jit
def subtract_max(left, right):
    """Return the rows' maxima over both halves, and both halves relative to them."""
    top = tl.maximum(tl.max(left, 1), tl.max(right, 1))
    return top, left - finite(top)[:, None], right - finite(top)[:, None]


@triton.jit
def store_sums(plane, plane_stride, valid, top, left_d, right_d, left_e, right_e, INFINITE: tl.constexpr):
    """Store m, s and a of the rows; return a/s."""
    s = tl.sum(left_e, 1) + tl.sum(right_e, 1)
    a = moment(left_e, left_d, INFINITE) + moment(right_e, right_d, INFINITE)
    tl.store(plane, top, mask=valid)
    tl.store(plane + plane_stride, s, mask=valid)
    tl.store(plane + 2 * plane_stride, a, mask=valid)
    return mean(a, s)


@triton.jit
def select_column(z, column, wanted):
    """Return z at the rows' wanted columns, 0 where they are not in the tile."""
    return tl.sum(tl.where(wanted[:, None] == column[None, :], z, 0.0), 1)


@triton.jit(do_not_specialize=["rows"])
def statistics_kernel(
    partials,  # (planes, tiles, C) of `logits_kernel`
    width,  # (1,)
    target_logit,  # (C,)
    softmax_stats,  # (2 or 4, C) float32, out: M, log s[, M_r, log s_r]
    logprob,  # (C,) out
    entropy,  # (C,) | None, out
    kl,  # (C,) | None, out
    rows,
    vocabulary,
    plane_stride,
    BR: tl.constexpr,
    BT: tl.constexpr,
):
    """Merge the statistics of the tiles for BR rows, BT tiles at a time, in order."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    valid = row < rows
    tiles = tl.cdiv(vocabulary, tl.load(width))
    top = tl.full((BR,), float("-inf"), tl.float32)
    s = tl.zeros((BR,), tl.float32)
    a = tl.zeros((BR,), tl.float32)
    ref_top = tl.full((BR,), float("-inf"), tl.float32)
    ref_s = tl.zeros((BR,), tl.float32)
    b = tl.zeros((BR,), tl.float32)
    for first in range(0, tiles, BT):
        tile = first + tl.arange(0, BT)
        mask = (tile < tiles)[:, None] & valid[None, :]
        plane = partials + tile.to(tl.int64)[:, None] * rows + row[None, :]  # (BT, BR)
        m_t = tl.load(plane, mask=mask, other=float("-inf"))
        s_t = tl.load(plane + plane_stride, mask=mask, other=0.0)
        before = top
        top = tl.maximum(before, tl.max(m_t, 0))
        old = exp(before - finite(top))  # (BR,): rescales the sums so far
        new = exp(m_t - finite(top)[None, :])  # (BT, BR)
        if entropy is not None:
            a_t = tl.load(plane + 2 * plane_stride, mask=mask, other=0.0)
            a = mul_or_zero(old, a + mul_or_zero(s, before - finite(top)))
            a += tl.sum(mul_or_zero(new, a_t + mul_or_zero(s_t, m_t - finite(top)[None, :])), 0)
        if kl is not None:
            ref_m_t = tl.load(plane + 3 * plane_stride, mask=mask, other=float("-inf"))
            ref_s_t = tl.load(plane + 4 * plane_stride, mask=mask, other=0.0)
            b_t = tl.load(plane + 6 * plane_stride, mask=mask, other=0.0)
            ref_before = ref_top
            ref_top = tl.maximum(ref_before, tl.max(ref_m_t, 0))
            moved = (before - finite(top)) - (ref_before - finite(ref_top))
            b = mul_or_zero(old, b + mul_or_zero(s, moved))
            moved_t = (m_t - finite(top)[None, :]) - (ref_m_t - finite(ref_top)[None, :])
            b += tl.sum(mul_or_zero(new, b_t + mul_or_zero(s_t, moved_t)), 0)
            ref_s = mul_or_zero(exp(ref_before - finite(ref_top)), ref_s)
            ref_s += tl.sum(mul_or_zero(exp(ref_m_t - finite(ref_top)[None, :]), ref_s_t), 0)
        s = old * s + tl.sum(new * s_t, 0)

    log_s = tl.log(s)
    tl.store(softmax_stats + row, top, mask=valid)
    tl.store(softmax_stats + rows + row, log_s, mask=valid)
    tl.store(logprob + row, tl.load(target_logit + row, mask=valid) - finite(top) - log_s, mask=valid)
    if entropy is not None:
        tl.store(entropy + row, log_s - a / s, mask=valid)
    if kl is not None:
        ref_log_s = tl.log(ref_s)
        tl.store(softmax_stats + 2 * rows + row, ref_top, mask=valid)
        tl.store(softmax_stats + 3 * rows + row, ref_log_s, mask=valid)
        tl.store(kl + row, b / s - log_s + ref_log_s, mask=valid)
