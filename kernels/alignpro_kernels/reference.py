"""The specification of the head's operators, in plain PyTorch: what every fast backend must compute.

    u = W h + c                                (N, V)
    z = softcap · tanh(u / softcap) / τ        logits of the distribution
    log p = z − log Σ exp z                    and log q likewise from the reference's hidden state
    logprob = log p_y      entropy H = −Σ p log p      KL = Σ p (log p − log q)

With α, η, κ the derivatives of a loss in the three statistics of a row, its gradient in the logits is

    dz_j = α (δ_jy − p_j) − η p_j (log p_j + H) + κ p_j (log p_j − log q_j − KL)
    du = dz · (1 − tanh²(u / softcap)) / τ      dh = Wᵀ du      dW = du hᵀ      dc = Σ du

The logits are held whole, in float32 (float64 for float64 inputs). Arguments are those of the public operators, which
check them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignpro_kernels.noise import gumbel_noise
from alignpro_kernels.types import Coefficients, PolicyLossOutput, SampleOutput, TokenStats


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    entropy: bool = False,
) -> TokenStats:
    """See `alignpro_kernels.linear_logprob`."""
    logp = head_logits(hidden, weight, bias, temperature, softcap).log_softmax(-1)  # (..., V)
    logq = _reference_logp(ref_hidden, weight, bias, ref_weight, ref_bias, temperature, softcap)
    return _statistics(logp, logq, target, entropy)


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficients: Coefficients,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    entropy: bool = False,
) -> PolicyLossOutput:
    """See `alignpro_kernels.policy_loss`."""
    with torch.no_grad():
        z = head_logits(hidden, weight, bias, temperature, softcap)
        logp = z.log_softmax(-1)  # (..., V)
        logq = _reference_logp(ref_hidden, weight, bias, ref_weight, ref_bias, temperature, softcap)
        stats = _statistics(logp, logq, target, entropy)
        rows = torch.arange(target.numel(), device=target.device)
        loss, alpha, eta, kappa = _evaluate(coefficients, stats, rows)

    inputs = (hidden, weight, bias)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    if not any(wanted):
        return PolicyLossOutput(loss, *stats)

    with torch.no_grad():
        dz = _row_gradient(logp, logq, stats, target, alpha, eta, kappa)
        tau = _column(temperature, z)
        du = dz / tau if softcap is None else dz * (1 - (z * tau / softcap).square()) / tau
        du = du.reshape(-1, du.shape[-1])  # (N, V)
        h = hidden.reshape(-1, hidden.shape[-1]).to(du.dtype)  # (N, D)
        gradients = (
            (du @ weight.to(du.dtype)).view_as(hidden).to(hidden.dtype) if wanted[0] else None,
            (du.T @ h).to(weight.dtype) if wanted[1] else None,
            du.sum(0).to(bias.dtype) if wanted[2] and bias is not None else None,
        )
    return PolicyLossOutput(_KnownGradients.apply(loss, gradients, *inputs), *stats)


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    seeds: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> SampleOutput:
    """See `alignpro_kernels.linear_sample`."""
    with torch.no_grad():
        z = head_logits(hidden, weight, bias, 1.0, softcap)  # (..., V)
        tau = _column(temperature, z).expand(*z.shape[:-1], 1)
        greedy = tau == 0
        z = z / tau.masked_fill(greedy, 1.0)
        noise = gumbel_noise(seeds, z.shape[-1], z.dtype).masked_fill(greedy, 0.0)
        token = (z + noise).argmax(-1)
        stats = _statistics(z.log_softmax(-1), None, token, entropy=True)
        assert stats.entropy is not None
        # At temperature 0 the distribution really sampled from is one point: logprob and entropy are 0.
        point = greedy.squeeze(-1)
        return SampleOutput(token, stats.logprob.masked_fill(point, 0.0), stats.entropy.masked_fill(point, 0.0))


def merge_states(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> Tensor:
    """See `alignpro_kernels.merge_states`."""
    lse = torch.stack([_wide(part) for part in lses])  # (S, ...)
    # Subtracting the maximum by hand: a softmax would give NaN where every part is empty.
    top = lse.amax(0).clamp_min(torch.finfo(lse.dtype).min)
    weights = (lse - top).exp()
    weights = weights / weights.sum(0).clamp_min(torch.finfo(lse.dtype).tiny)
    merged = torch.zeros_like(_wide(outs[0]))
    for out, weight in zip(outs, weights, strict=True):
        column = weight.unsqueeze(-1)
        merged = merged + torch.where(column > 0, column * _wide(out), 0.0)  # an empty part may hold anything, NaN too
    return merged.to(outs[0].dtype)


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float | Tensor, softcap: float | None
) -> Tensor:
    """z = softcap(W h + c) / τ, (..., V), float32 (float64 for float64 inputs)."""
    u = _wide(hidden) @ _wide(weight).T
    if bias is not None:
        u = u + _wide(bias)
    if softcap is not None:
        u = softcap * torch.tanh(u / softcap)
    return u / _column(temperature, u)


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients are known already: backward scales them and hands them on."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor | None, ...], *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if g is None else (scale * g).to(g.dtype) for g in ctx.saved_tensors)


def _statistics(logp: Tensor, logq: Tensor | None, target: Tensor, entropy: bool) -> TokenStats:
    p = logp.exp()
    return TokenStats(
        logprob=logp.gather(-1, target.unsqueeze(-1)).squeeze(-1),
        entropy=-(p * logp).sum(-1) if entropy else None,
        kl=(p * (logp - logq)).sum(-1) if logq is not None else None,
    )


def _row_gradient(
    logp: Tensor,
    logq: Tensor | None,
    stats: TokenStats,
    target: Tensor,
    alpha: Tensor | None,
    eta: Tensor | None,
    kappa: Tensor | None,
) -> Tensor:
    """dz of every row, (..., V), by the formula at the top."""
    p = logp.exp()
    dz = torch.zeros_like(p)
    if alpha is not None:
        delta = torch.zeros_like(p).scatter_(-1, target.unsqueeze(-1), 1.0)
        dz += alpha.view_as(target).unsqueeze(-1) * (delta - p)
    if eta is not None and stats.entropy is not None:
        dz -= eta.view_as(target).unsqueeze(-1) * p * (logp + stats.entropy.unsqueeze(-1))
    if kappa is not None and stats.kl is not None and logq is not None:
        dz += kappa.view_as(target).unsqueeze(-1) * p * (logp - logq - stats.kl.unsqueeze(-1))
    return dz


def _reference_logp(
    ref_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
) -> Tensor | None:
    """log q, (..., V), a constant; a shared head brings its bias along."""
    if ref_hidden is None:
        return None
    if ref_weight is None:
        ref_weight, ref_bias = weight, (bias if ref_bias is None else ref_bias)
    with torch.no_grad():
        return head_logits(ref_hidden, ref_weight, ref_bias, temperature, softcap).log_softmax(-1)


def _evaluate(
    coefficients: Coefficients, stats: TokenStats, rows: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss () and the three coefficients, (N,) each or None."""
    flat = [None if x is None else x.flatten() for x in stats]
    assert flat[0] is not None
    if rows.numel() == 0:  # no chunk, so no call
        return flat[0].sum(), None, None, None
    loss_terms, *derivatives = coefficients(flat[0], flat[1], flat[2], rows)
    names = ("alpha", "eta", "kappa")
    for name, value in zip(("loss_terms", *names), (loss_terms, *derivatives), strict=True):
        if value is not None and value.shape != rows.shape:
            raise ValueError(f"coefficients: {name} has shape {tuple(value.shape)}, expected {tuple(rows.shape)}")
    if derivatives[1] is not None and stats.entropy is None:
        raise ValueError("coefficients: eta given, but the entropy was not asked for: pass entropy=True")
    if derivatives[2] is not None and stats.kl is None:
        raise ValueError("coefficients: kappa given, but there is no reference: pass ref_hidden")
    alpha, eta, kappa = (None if value is None else value.to(flat[0].dtype) for value in derivatives)
    return loss_terms.to(flat[0].dtype).sum(), alpha, eta, kappa


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _column(temperature: float | Tensor, like: Tensor) -> Tensor:
    """τ as (..., 1), or () for one of all rows."""
    tau = torch.as_tensor(temperature, dtype=like.dtype, device=like.device).detach()
    return tau.unsqueeze(-1) if tau.ndim else tau
