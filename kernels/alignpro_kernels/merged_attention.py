"""Attention to several sets of keys, each computed by a variable-length call, merged by their log-sum-exp.

For one query, let the keys be split into parts i, whose attention alone gives (o_i, l_i), l_i the log-sum-exp of the
scores. The attention to all keys is

    l = log Σ_i e^{l_i}      o = Σ_i e^{l_i − l} o_i

(Hydragen, Juravsky et al., 2024). Its gradient does not need the gradients of the parts' log-sum-exp, which flash-attn 2
and 3 do not give: with P_ij = exp(z_ij − l), the probability of key j among *all* keys, and δ_i = do_i · o_i from the
merged output, the gradient of a score is

    dz_ij = P_ij (do_i · v_j − δ_i)

for every key, whichever part it is in. That is what the backward kernels of FlashAttention compute from the log-sum-exp
and the output that they are given. So each part's backward pass is called with the *merged* output and the *merged*
log-sum-exp, and returns its keys' part of the gradient; gradients of queries are summed over the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from alignpro_kernels.autograd import differentiable_once
from alignpro_kernels.varlen import ScoreOptions, Varlen, VarlenKernels

Rows: TypeAlias = Tensor | slice
"""Different rows of a tensor: int64 indices, or a slice, which is not copied."""

ALL = slice(None)


@dataclass(frozen=True)
class Part:
    """The attention of some queries to some keys, in one variable-length call."""

    queries: Rows
    """Which of the T queries, in the order of ``varlen``."""
    keys: Rows
    """Which of the U keys, in the order of ``varlen``."""
    varlen: Varlen
    """Which of these queries see which of these keys; every query at least one."""


@torch.compiler.disable
def merged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: Sequence[Part],
    kernels: VarlenKernels,
    options: ScoreOptions,
) -> Tensor:
    """Compute the attention of T queries to the union of their keys in all parts; differentiable once.

    Args:
        query: (T, H, D).
        key: (U, H', D), H a multiple of H'.
        value: As ``key``.
        parts: At least one. The first has all queries, in order (`ALL`). A query sees a key in at most one part.
        kernels: Compute the parts.
        options: How scores are computed; the window is that of the causal parts.

    Returns:
        (T, H, D) in the dtype of ``query``. Parts are merged in float32.

    Raises:
        ValueError: The first part does not have all queries.
    """
    if not parts or not _is_all(parts[0].queries):
        raise ValueError("parts: the first one must have all queries")
    out: Tensor = _MergedAttention.apply(query, key, value, parts, kernels, options)
    return out


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        parts: Sequence[Part],
        kernels: VarlenKernels,
        options: ScoreOptions,
    ) -> Tensor:
        merged: tuple[Tensor, Tensor] | None = None
        for part in parts:
            at, of = part.queries, part.keys
            out, lse = kernels.forward(query[at], key[of], value[of], part.varlen, _options_of(part, options))
            merged = (out.to(lse.dtype), lse) if merged is None else _merge(*merged, out, lse, at)
        assert merged is not None
        result = merged[0].to(query.dtype)
        ctx.save_for_backward(query, key, value, result, merged[1])
        ctx.parts, ctx.kernels, ctx.options = parts, kernels, options
        return result

    @staticmethod
    @differentiable_once("PyTorch's scaled_dot_product_attention")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        gradient = gradient.contiguous()
        dq: Tensor | None = None
        dk: Tensor | None = None
        dv: Tensor | None = None
        for part in ctx.parts:
            at, of = part.queries, part.keys
            # The merged output and log-sum-exp, not the part's own: see the module's docstring.
            given = gradient[at], query[at], key[of], value[of], out[at], lse[at]
            of_queries, of_keys, of_values = ctx.kernels.backward(*given, part.varlen, _options_of(part, ctx.options))
            dq = _add(dq, at, of_queries, query)
            dk, dv = _add(dk, of, of_keys, key), _add(dv, of, of_values, value)
        return dq, dk, dv, None, None, None


def _options_of(part: Part, options: ScoreOptions) -> ScoreOptions:
    return options if part.varlen.causal else replace(options, window=None)


def _merge(merged: Tensor, merged_lse: Tensor, out: Tensor, lse: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Merge the attention of ``rows`` to further keys into that so far, (T, H, D) and (T, H), both in place."""
    before, before_lse = merged[rows], merged_lse[rows]
    share = torch.sigmoid(lse - before_lse).unsqueeze(-1)  # of the further keys
    merged[rows] = torch.lerp(before, out.to(before.dtype), share)
    merged_lse[rows] = torch.logaddexp(before_lse, lse)
    return merged, merged_lse


def _is_all(rows: Rows) -> bool:
    return isinstance(rows, slice) and rows == ALL


def _add(total: Tensor | None, rows: Rows, part: Tensor, like: Tensor) -> Tensor:
    """Add a part of the gradient of ``like`` to the sum so far. Rows are different, so the order of additions is fixed."""
    if total is None and _is_all(rows):
        return part
    total = like.new_zeros(like.shape) if total is None else total
    total[rows] += part
    return total
