"""Backend ``torch``: the head in chunks of rows and tiles of the vocabulary, in plain PyTorch; runs anywhere.

A chunk's logits are stored once, in float32 (float64 for float64 inputs). Everything else is computed one vocabulary
tile at a time, so that no temporary is as large as the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from alignpro_kernels.head import LOWEST, Head, HeadGradients, Rows, RowStats, statistics_dtype, wide
from alignpro_kernels.noise import gumbel_noise
from alignpro_kernels.types import SampleOutput

_BUDGET = {"cpu": 192 << 20, "cuda": 1 << 30}  # bytes of logits in flight
_TILE = 8192  # vocabulary entries per step, whose temporaries are small compared with the logits


@dataclass
class Logits:
    """Logits of a chunk and their normalisers."""

    z: Tensor
    """(C, V)"""
    top: Tensor
    """(C, 1): the largest logit m."""
    log_sum: Tensor
    """(C, 1): log Σ e^{z−m}."""


@dataclass
class Kept:
    """What `backward` needs of a chunk's `forward`."""

    z: Tensor
    """(C, V)"""
    ref_z: Tensor | None
    """Likewise, of the reference."""


def rows_in_flight(head: Head, dtype: torch.dtype) -> int:
    """Return the maximum number of rows per chunk."""
    budget = _BUDGET.get(head.weight.device.type, _BUDGET["cuda"])
    return max(1, budget // (head.logits_per_row * statistics_dtype(dtype).itemsize))


def rows_in_gradient(head: Head) -> int:
    """See `alignpro_kernels.head`."""
    return 0


def forward(head: Head, rows: Rows, *, entropy: bool, keep: bool) -> tuple[RowStats, Kept | None]:
    """See `alignpro_kernels.head`."""
    assert rows.target is not None
    policy = _logits(rows.hidden, head.weight, head.bias, head.softcap, rows.temperature, rows.low_rank, head.low_rank)
    reference = None
    if head.ref_weight is not None and rows.ref_hidden is not None:
        reference = _logits(rows.ref_hidden, head.ref_weight, head.ref_bias, head.softcap, rows.temperature)
    chosen = policy.z.gather(1, rows.target.unsqueeze(1))
    h = kl = None
    if entropy or reference is not None:
        # Relative to the maxima: H = log s − Σ e^{z−m}(z−m)/s, so that an offset of the logits costs no precision.
        h = policy.log_sum.clone() if entropy else None
        kl = torch.zeros_like(policy.log_sum) if reference is not None else None
        for tile in _tiles(head):
            logp = (policy.z[:, tile] - policy.top - policy.log_sum).clamp_min_(LOWEST)
            p = logp.exp()
            if h is not None:
                h -= (p * (logp + policy.log_sum)).sum(1, keepdim=True)
            if kl is not None and reference is not None:
                logp -= (reference.z[:, tile] - reference.top - reference.log_sum).clamp_min_(LOWEST)
                kl += p.mul_(logp).sum(1, keepdim=True)
    norms = [policy.top, policy.log_sum] + ([] if reference is None else [reference.top, reference.log_sum])
    stats = RowStats(
        (chosen - policy.top - policy.log_sum).squeeze(1),
        None if h is None else h.squeeze(1),
        None if kl is None else kl.squeeze(1),
        torch.cat(norms, 1).T.contiguous(),
    )
    return stats, Kept(policy.z, None if reference is None else reference.z) if keep else None


def backward(
    head: Head,
    rows: Rows,
    kept: Kept,
    stats: RowStats,
    active: Tensor | None,
    alpha: Tensor | None,
    eta: Tensor | None,
    kappa: Tensor | None,
    gradients: HeadGradients,
) -> None:
    """See `alignpro_kernels.head`; the formula is that of `alignpro_kernels.reference`."""
    assert rows.target is not None
    if active is not None:
        rows = rows.select(active)

    def column(x: Tensor | None) -> Tensor:
        assert x is not None  # a coefficient is only given together with its statistic
        return (x if active is None else x[active]).unsqueeze(1)

    norms = (stats.norms if active is None else stats.norms[:, active]).unsqueeze(2)  # (2 or 4, A, 1)
    top, log_sum = norms[0], norms[1]
    tau = _column(rows.temperature)
    assert rows.target is not None
    d_hidden = None if gradients.hidden is None else torch.zeros_like(rows.hidden, dtype=log_sum.dtype)
    d_low_rank_rows = None
    if gradients.low_rank_rows is not None and rows.low_rank is not None:
        d_low_rank_rows = torch.zeros_like(rows.low_rank, dtype=log_sum.dtype)

    for tile in _tiles(head):
        z = kept.z[:, tile] if active is None else kept.z[:, tile].index_select(0, active)  # (A, tile)
        logp = (z - top - log_sum).clamp_min_(LOWEST)
        p = logp.exp()
        factor = torch.zeros_like(p)  # dz = α δ − p · factor
        if alpha is not None:
            factor += column(alpha)
        if eta is not None:
            factor += column(eta) * (logp + column(stats.entropy))
        if kappa is not None and kept.ref_z is not None:
            ref_z = kept.ref_z[:, tile] if active is None else kept.ref_z[:, tile].index_select(0, active)
            logq = (ref_z - norms[2] - norms[3]).clamp_min_(LOWEST)
            factor -= column(kappa) * (logp - logq - column(stats.kl))
        du = factor.mul_(p).neg_()
        if alpha is not None:
            here = rows.target.unsqueeze(1) - tile.start
            inside = (here >= 0) & (here < du.shape[1])
            du.scatter_add_(1, here.clamp(0, du.shape[1] - 1), column(alpha) * inside)
        if head.softcap is not None:
            du *= 1 - (z * tau / head.softcap).square()
        du /= tau
        if d_hidden is not None:
            d_hidden += _product(du, head.weight[tile])
        if d_low_rank_rows is not None and head.low_rank is not None:
            d_low_rank_rows += _product(du, head.low_rank[tile])
        for into, other_side in ((gradients.weight, rows.hidden), (gradients.low_rank, rows.low_rank)):
            if into is not None and other_side is not None:
                _add(into[tile], _product(du.T, other_side), gradients.accumulate)
        if gradients.bias is not None:
            _add(gradients.bias[tile], du.sum(0), gradients.accumulate)

    for result, into in ((d_hidden, gradients.hidden), (d_low_rank_rows, gradients.low_rank_rows)):
        if result is None or into is None:
            continue
        if active is None:
            into.copy_(result)
        else:
            into.zero_().index_copy_(0, active, result.to(into.dtype))


def sample(head: Head, rows: Rows, seeds: Tensor) -> SampleOutput:
    """See `alignpro_kernels.head`."""
    count, dtype = len(rows.hidden), statistics_dtype(rows.hidden.dtype)
    tau = rows.temperature
    if not isinstance(tau, Tensor):
        tau = torch.full((count,), tau, dtype=dtype, device=seeds.device)
    greedy = tau == 0
    tau = tau.masked_fill(greedy, 1.0)
    parts = []
    most = max(1, rows_in_flight(head, rows.hidden.dtype))
    for start in range(0, count, most):
        chunk = slice(start, start + most)
        low_rank = None if rows.low_rank is None else rows.low_rank[chunk]
        kept = _logits(rows.hidden[chunk], head.weight, head.bias, head.softcap, tau[chunk], low_rank, head.low_rank)
        best = torch.full_like(kept.top, -torch.inf)
        token = torch.zeros_like(best, dtype=torch.int64)
        h = kept.log_sum.clone()
        for tile in _tiles(head):
            z = kept.z[:, tile]
            noise = gumbel_noise(seeds[chunk], z.shape[1], dtype, start=tile.start)
            value, index = (z + noise.masked_fill(greedy[chunk, None], 0.0)).max(1, keepdim=True)
            # NaN wins, as in an argmax over the whole row.
            better = (value > best) | (value.isnan() & ~best.isnan())
            token = torch.where(better, index + tile.start, token)
            best = torch.where(better, value, best)
            logp = (z - kept.top - kept.log_sum).clamp_min_(LOWEST)
            h -= (logp.exp() * (logp + kept.log_sum)).sum(1, keepdim=True)
        logprob = kept.z.gather(1, token) - kept.top - kept.log_sum
        point = greedy[chunk, None]
        parts.append((token, logprob.masked_fill(point, 0.0), h.masked_fill(point, 0.0)))
    return SampleOutput(*(torch.cat(column).squeeze(1) for column in zip(*parts, strict=True)))


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float | Tensor,
    low_rank_rows: Tensor | None = None,
    low_rank: Tensor | None = None,
) -> Logits:
    z = torch.empty(len(hidden), len(weight), dtype=statistics_dtype(hidden.dtype), device=hidden.device)
    for start in range(0, len(weight), _TILE):
        tile = slice(start, min(start + _TILE, len(weight)))
        u = _product(hidden, weight[tile].T)
        if low_rank is not None and low_rank_rows is not None:
            u += _product(low_rank_rows, low_rank[tile].T)
        if bias is not None:
            u += bias[tile].to(u.dtype)
        if softcap is not None:
            u = (u / softcap).tanh_().mul_(softcap)
        torch.div(u, _column(temperature), out=z[:, tile])
    top = z.amax(1, keepdim=True)
    top = top.masked_fill(top.isinf() & (top < 0), 0.0)  # if all logits are −inf, −inf − (−inf) would be NaN
    total = torch.zeros_like(top)
    for start in range(0, len(weight), _TILE):
        total += (z[:, start : start + _TILE] - top).exp_().sum(1, keepdim=True)
    return Logits(z, top, total.log_())


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b with wide accumulators; a wide ``a`` is rounded to 16 bits where only such products are fast."""
    if b.dtype == a.dtype == statistics_dtype(a.dtype):
        return a @ b
    if a.is_cuda:
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return wide(a) @ wide(b)


def _add(into: Tensor, value: Tensor, accumulate: bool) -> None:
    if accumulate:
        into += value
    else:
        into.copy_(value)


def _tiles(head: Head) -> Iterator[slice]:
    vocabulary = len(head.weight)
    for start in range(0, vocabulary, _TILE):
        yield slice(start, min(start + _TILE, vocabulary))


def _column(temperature: float | Tensor) -> float | Tensor:
    return temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature
