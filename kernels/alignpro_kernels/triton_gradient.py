"""Kernels that turn a chunk's logits into their gradient, in place, and add a chunk's weight gradient to a float32 sum.

They apply the formula of `alignpro_kernels.reference` to what `logits_kernel` stored:

    log p = (z − m − a/s) + a/s + (m − M) − log s
    du_j = (α δ_jy + p_j (−α − η (log p_j + H) + κ (log p_j − log q_j − KL))) (1 − (z_j τ / softcap)²) / τ
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from alignpro_kernels.triton_product import downcast, exp, mean, multiply, row_temperature


@triton.jit
def tile_mean(plane, plane_stride, mask):
    """Return a/s of rows within a tile; ``plane`` points to their m."""
    s = tl.load(plane + plane_stride, mask=mask, other=1.0)
    return mean(tl.load(plane + 2 * plane_stride, mask=mask, other=0.0), s)


@triton.jit(do_not_specialize=["rows", "count"])
def gradient_kernel(
    saved,  # (C, kept_stride): z − m − a/s; out: du of the active rows, in the first A rows
    ref_saved,  # (C, kept_stride): z_r − m_r − a_r/s_r | None
    active,  # (A,) int64 ascending | None: all rows
    partials,  # (planes, tiles, C) of `logits_kernel`
    width,  # (1,): BN of `logits_kernel`
    softmax_stats,  # (2 or 4, C) of `statistics_kernel`
    entropy,  # (C,) | None
    kl,  # (C,) | None
    alpha,  # (C,) | None
    eta,  # (C,) | None
    kappa,  # (C,) | None
    target,  # (C,) int64
    temperatures,  # (C,) float32 | None
    bias_gradient,  # (V,) float32 | None
    grad_scale,  # () float32 | None: factor applied to the stored gradients
    count,  # A
    rows,  # C
    vocabulary,
    saved_stride,
    plane_stride,
    temperature,
    softcap,  # float | None
    ADD: tl.constexpr,  # add to bias_gradient instead of overwriting it
    BR: tl.constexpr,
    BV: tl.constexpr,  # divides the tiles of `logits_kernel`
):
    """Compute the gradient of BV columns, iterating over the active rows or a part of them.

    Row active[i] is read and row i is written. Since active[i] ≥ i, a single program that iterates in order compacts the
    rows without overwriting unread ones. With a bias or with ``active`` there must be one program per column block;
    otherwise the rows are split over several programs.
    """
    column = tl.program_id(0) * BV + tl.arange(0, BV)
    inside = column < vocabulary
    tile = (tl.program_id(0) * BV // tl.load(width)).to(tl.int64)
    share = tl.cdiv(tl.cdiv(count, tl.num_programs(1)), BR) * BR
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, count)
    bias_sum = tl.zeros((BV,), tl.float32)
    for first in range(begin, end, BR):
        position = first + tl.arange(0, BR)
        valid = position < end
        row = tl.load(active + position, mask=valid, other=0) if active is not None else position.to(tl.int64)
        mask = valid[:, None] & inside[None, :]
        offset = row[:, None] * saved_stride + column[None, :]  # C·V may exceed 2³¹
        plane = partials + tile * rows + row
        d = tl.load(saved + offset, mask=mask, other=0.0).to(tl.float32)
        d += tile_mean(plane, plane_stride, valid)[:, None]  # z − m
        top = tl.load(plane, mask=valid, other=0.0)
        shift = (
            top
            - tl.load(softmax_stats + row, mask=valid, other=0.0)
            - tl.load(softmax_stats + rows + row, mask=valid, other=0.0)
        )
        logp = d + shift[:, None]
        p = exp(logp)

        factor = tl.zeros((BR, BV), tl.float32)
        if eta is not None:
            weight = tl.load(eta + row, mask=valid, other=0.0)
            factor -= weight[:, None] * (logp + tl.load(entropy + row, mask=valid, other=0.0)[:, None])
        if kappa is not None:
            weight = tl.load(kappa + row, mask=valid, other=0.0)
            ref_d = tl.load(ref_saved + offset, mask=mask, other=0.0).to(tl.float32)
            plane += 3 * plane_stride
            ref_shift = tl.load(plane, mask=valid, other=0.0) - tl.load(
                softmax_stats + 2 * rows + row, mask=valid, other=0.0
            )
            ref_shift += tile_mean(plane, plane_stride, valid)
            ref_shift -= tl.load(softmax_stats + 3 * rows + row, mask=valid, other=0.0)
            centre = tl.load(kl + row, mask=valid, other=0.0)
            factor += weight[:, None] * (logp - (ref_d + ref_shift[:, None]) - centre[:, None])
        if alpha is not None:
            weight = tl.load(alpha + row, mask=valid, other=0.0)
            factor -= weight[:, None]
        du = tl.where(p == 0.0, 0.0, p * factor)  # 0·∞ counts as 0; NaN propagates
        if alpha is not None:
            wanted = tl.load(target + row, mask=valid, other=-1).to(tl.int32)
            du += tl.where(wanted[:, None] == column[None, :], weight[:, None], 0.0)

        tau = row_temperature(temperatures, temperature, row, valid)
        if softcap is not None:
            capped = (d + top[:, None]) * (tau / softcap)[:, None]
            du *= 1.0 - capped * capped
        du *= (1.0 / tau)[:, None]
        if bias_gradient is not None:
            bias_sum += tl.sum(tl.where(mask, du, 0.0), 0)
        if grad_scale is not None:
            du *= tl.load(grad_scale)
        if active is not None:
            tl.debug_barrier()  # all threads must have read these rows before any thread overwrites them
        out = position.to(tl.int64)[:, None] * saved_stride + column[None, :]
        tl.store(saved + out, downcast(du, saved.dtype.element_ty), mask=mask)
    if bias_gradient is not None:
        if ADD:
            bias_sum += tl.load(bias_gradient + column, mask=inside, other=0.0)
        tl.store(bias_gradient + column, bias_sum, mask=inside)


@triton.jit(do_not_specialize=["count"])
def accumulate_kernel(
    total,  # (V, D) float32, out
    du,  # (A, du_stride)
    x,  # (A, D)
    inverse_grad_scale,  # () float32 | None: factor applied to the product
    count,  # A
    vocabulary,
    du_stride,
    D: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute total (+)= duᵀ x in float32, for devices whose BLAS has no such mixed-precision product."""
    columns = tl.cdiv(D, BN)
    v = (tl.program_id(0) // columns) * BM + tl.arange(0, BM)
    d = (tl.program_id(0) % columns) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a = du + tl.minimum(v, vocabulary - 1)[:, None] + k.to(tl.int64)[None, :] * du_stride  # (BM, BK)
    b = x + tl.minimum(d, D - 1)[None, :] + k.to(tl.int64)[:, None] * D  # (BK, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, count, BK):
        left = k < count - first
        acc = multiply(
            tl.load(a, mask=left[None, :], other=0.0), tl.load(b, mask=left[:, None], other=0.0), acc, PRECISION
        )
        a += BK * du_stride
        b += BK * D
    if inverse_grad_scale is not None:
        acc *= tl.load(inverse_grad_scale)
    out = total + v.to(tl.int64)[:, None] * D + d[None, :]
    mask = (v < vocabulary)[:, None] & (d < D)[None, :]
    if ADD:
        acc += tl.load(out, mask=mask, other=0.0)
    tl.store(out, acc, mask=mask)
