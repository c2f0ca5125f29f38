"""Kernel that merges the attention over several sets of keys; see `alignpro_kernels.merge_states`."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from alignpro_kernels.triton_product import downcast, exp


@triton.jit(do_not_specialize=["rows"])
def merge_kernel(
    outs,  # (S, rows, D)
    lses,  # (S, rows)
    merged,  # (rows, D) out
    rows,
    D: tl.constexpr,
    S: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Compute Σ softmax(lse) · out for BR rows and BD columns."""
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    valid = row < rows
    mask = valid[:, None] & (column < D)[None, :]
    top = tl.full((BR,), -3.4028234663852886e38, tl.float32)  # finite: −∞ − (−∞) is NaN
    for part in range(S):
        lse = tl.load(lses + part * rows.to(tl.int64) + row, mask=valid, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, lse)
    total = tl.zeros((BR,), tl.float32)
    acc = tl.zeros((BR, BD), tl.float32)
    for part in range(S):
        lse = tl.load(lses + part * rows.to(tl.int64) + row, mask=valid, other=float("-inf")).to(tl.float32)
        weight = exp(lse - top)
        total += weight
        pointers = (part * rows.to(tl.int64) + row)[:, None] * D + column[None, :]
        out = tl.load(outs + pointers, mask=mask, other=0.0).to(tl.float32)
        # An empty part may hold anything, even NaN.
        acc += tl.where(weight[:, None] == 0.0, 0.0, weight[:, None] * out)
    acc = acc / tl.maximum(total, 1.1754943508222875e-38)[:, None]
    tl.store(merged + row[:, None] * D + column[None, :], downcast(acc, merged.dtype.element_ty), mask=mask)
