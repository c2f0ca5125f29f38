"""Backend ``torch``: the head in chunks of rows and tiles of the vocabulary, in plain PyTorch; runs anywhere.

A chunk's logits are stored once, in float32 (float64 for float64 inputs). Everything else is computed one vocabulary
tile at a time, so that no temporary is as large as the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from alignpro_kernels.head import MIN_LOGPROB, Head, HeadGradients, Rows, RowStats, Upstream, stats_dtype, upcast
from alignpro_kernels.noise import gumbel_noise
from alignpro_kernels.types import SampleOutput

_BUDGET = {"cpu": 192 << 20, "cuda": 1 << 30}  # bytes of a chunk's logits
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
class SavedLogits:
    """What `backward` needs of a chunk's `forward`."""

    z: Tensor
    """(C, V)"""
    ref_z: Tensor | None
    """Likewise, of the reference."""


def max_chunk_rows(head: Head, dtype: torch.dtype) -> int:
    """Return the maximum number of rows per chunk."""
    budget = _BUDGET.get(head.weight.device.type, _BUDGET["cuda"])
    return max(1, budget // (head.logits_per_row * stats_dtype(dtype).itemsize))


def logits_buffer_rows(head: Head) -> int:
    """See `alignpro_kernels.head`."""
    return 0


def forward(head: Head, rows: Rows, *, entropy: bool, save_logits: bool) -> tuple[RowStats, SavedLogits | None]:
    """See `alignpro_kernels.head`."""
    assert rows.target is not None
    policy = _logits(rows.hidden, head.weight, head.bias, head.softcap, rows.temperature, rows.lora_hidden, head.lora_b)
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
            logp = (policy.z[:, tile] - policy.top - policy.log_sum).clamp_min_(MIN_LOGPROB)
            p = logp.exp()
            if h is not None:
                h -= (p * (logp + policy.log_sum)).sum(1, keepdim=True)
            if kl is not None and reference is not None:
                logp -= (reference.z[:, tile] - reference.top - reference.log_sum).clamp_min_(MIN_LOGPROB)
                kl += p.mul_(logp).sum(1, keepdim=True)
    softmax_stats = [policy.top, policy.log_sum] + ([] if reference is None else [reference.top, reference.log_sum])
    stats = RowStats(
        (chosen - policy.top - policy.log_sum).squeeze(1),
        None if h is None else h.squeeze(1),
        None if kl is None else kl.squeeze(1),
        torch.cat(softmax_stats, 1).T.contiguous(),
    )
    return stats, SavedLogits(policy.z, None if reference is None else reference.z) if save_logits else None


def backward(
    head: Head, rows: Rows, saved: SavedLogits, stats: RowStats, upstream: Upstream, gradients: HeadGradients
) -> None:
    """See `alignpro_kernels.head`; the formula is that of `alignpro_kernels.reference`."""
    active, alpha, eta, kappa = upstream
    if active is not None:
        rows = rows.select(active)

    def column(x: Tensor | None) -> Tensor:
        assert x is not None  # a coefficient is only given together with its statistic
        return (x if active is None else x[active]).unsqueeze(1)

    softmax_stats = stats.softmax_stats if active is None else stats.softmax_stats[:, active]
    top, log_sum, *reference = softmax_stats.unsqueeze(2)  # (A, 1) each
    tau = _column(rows.temperature)
    assert rows.target is not None
    d_hidden = None if gradients.hidden is None else torch.zeros_like(rows.hidden, dtype=log_sum.dtype)
    d_lora_hidden = None
    if gradients.lora_hidden is not None and rows.lora_hidden is not None:
        d_lora_hidden = torch.zeros_like(rows.lora_hidden, dtype=log_sum.dtype)

    for tile in _tiles(head):
        z = saved.z[:, tile] if active is None else saved.z[:, tile].index_select(0, active)  # (A, tile)
        logp = (z - top - log_sum).clamp_min_(MIN_LOGPROB)
        p = logp.exp()
        factor = torch.zeros_like(p)  # dz = α δ − p · factor
        if alpha is not None:
            factor += column(alpha)
        if eta is not None:
            factor += column(eta) * (logp + column(stats.entropy))
        if kappa is not None and saved.ref_z is not None:
            ref_z = saved.ref_z[:, tile] if active is None else saved.ref_z[:, tile].index_select(0, active)
            logq = (ref_z - reference[0] - reference[1]).clamp_min_(MIN_LOGPROB)
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
        if d_lora_hidden is not None and head.lora_b is not None:
            d_lora_hidden += _product(du, head.lora_b[tile])
        for into, other_side in ((gradients.weight, rows.hidden), (gradients.lora_b, rows.lora_hidden)):
            if into is not None and other_side is not None:
                _add(into[tile], _product(du.T, other_side), gradients.accumulate)
        if gradients.bias is not None:
            _add(gradients.bias[tile], du.sum(0), gradients.accumulate)

    for result, into in ((d_hidden, gradients.hidden), (d_lora_hidden, gradients.lora_hidden)):
        if result is None or into is None:
            continue
        if active is None:
            into.copy_(result)
        else:
            into.zero_().index_copy_(0, active, result.to(into.dtype))


def sample(head: Head, rows: Rows, seeds: Tensor) -> SampleOutput:
    """See `alignpro_kernels.head`."""
    count, dtype = len(rows.hidden), stats_dtype(rows.hidden.dtype)
    tau = rows.temperature
    if not isinstance(tau, Tensor):
        tau = torch.full((count,), tau, dtype=dtype, device=seeds.device)
    greedy = tau == 0
    tau = tau.masked_fill(greedy, 1.0)
    parts = []
    max_rows = max(1, max_chunk_rows(head, rows.hidden.dtype))
    for start in range(0, count, max_rows):
        chunk = slice(start, start + max_rows)
        lora_b = None if rows.lora_hidden is None else rows.lora_hidden[chunk]
        saved = _logits(rows.hidden[chunk], head.weight, head.bias, head.softcap, tau[chunk], lora_b, head.lora_b)
        best = torch.full_like(saved.top, -torch.inf)
        token = torch.zeros_like(best, dtype=torch.int64)
        h = saved.log_sum.clone()
        for tile in _tiles(head):
            z = saved.z[:, tile]
            noise = gumbel_noise(seeds[chunk], z.shape[1], dtype, start=tile.start)
            value, index = (z + noise.masked_fill(greedy[chunk, None], 0.0)).max(1, keepdim=True)
            # NaN wins, as in an argmax over the whole row.
            better = (value > best) | (value.isnan() & ~best.isnan())
            token = torch.where(better, index + tile.start, token)
            best = torch.where(better, value, best)
            logp = (z - saved.top - saved.log_sum).clamp_min_(MIN_LOGPROB)
            h -= (logp.exp() * (logp + saved.log_sum)).sum(1, keepdim=True)
        logprob = saved.z.gather(1, token) - saved.top - saved.log_sum
        point = greedy[chunk, None] & ~saved.log_sum.isnan()
        parts.append((token, logprob.masked_fill(point, 0.0), h.masked_fill(point, 0.0)))
    return SampleOutput(*(torch.cat(column).squeeze(1) for column in zip(*parts, strict=True)))


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float | Tensor,
    lora_hidden: Tensor | None = None,
    lora_b: Tensor | None = None,
) -> Logits:
    z = torch.empty(len(hidden), len(weight), dtype=stats_dtype(hidden.dtype), device=hidden.device)
    for start in range(0, len(weight), _TILE):
        tile = slice(start, min(start + _TILE, len(weight)))
        u = _product(hidden, weight[tile].T)
        if lora_b is not None and lora_hidden is not None:
            u += _product(lora_hidden, lora_b[tile].T)
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
    if b.dtype == a.dtype == stats_dtype(a.dtype):
        return a @ b
    if a.is_cuda:
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return upcast(a) @ upcast(b)


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
