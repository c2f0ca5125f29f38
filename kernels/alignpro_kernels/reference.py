"""The specification of the head's operators, in plain PyTorch: what every fast backend must compute.

    u = W h + c                                (N, V)       with a LoRA, W + scale · B A instead of W
    z = softcap · tanh(u / softcap) / τ        logits of the distribution
    log p = z − log Σ exp z                    and log q likewise from the reference's hidden state
    logprob = log p_y      entropy H = −Σ p log p      KL = Σ p (log p − log q)

Gradients come from autograd. The fast backends compute them by hand: with α, η, κ the derivatives of a loss with respect
to the three statistics of a row, its gradient with respect to the logits is

    dz_j = α (δ_jy − p_j) − η p_j (log p_j + H) + κ p_j (log p_j − log q_j − KL)
    du = dz · (1 − tanh²(u / softcap)) / τ      dh = Wᵀ du      dW = Σ du hᵀ      dc = Σ du

All logits are materialised, in float32 (float64 for float64 inputs). The arguments are those of the public operators,
which have checked them and removed masked rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignpro_kernels.autograd import loss_with_gradients
from alignpro_kernels.coefficients import evaluate
from alignpro_kernels.head import MIN_LOGPROB, upcast
from alignpro_kernels.noise import gumbel_noise
from alignpro_kernels.types import Coefficients, LoRA, PolicyLossOutput, SampleOutput, TokenStats


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    entropy: bool = False,
) -> TokenStats:
    """See `alignpro_kernels.linear_logprob`."""
    logp = head_logits(hidden, weight, bias, temperature, softcap, lora).log_softmax(-1)  # (..., V)
    p, bounded = logp.exp(), logp.clamp_min(MIN_LOGPROB)  # makes p log p 0 where p is 0
    kl = None
    if ref_hidden is not None:
        with torch.no_grad():
            if ref_weight is None:  # a shared head: the reference uses its bias too, but not a LoRA
                ref_weight, ref_bias = weight, (bias if ref_bias is None else ref_bias)
            logq = head_logits(ref_hidden, ref_weight, ref_bias, temperature, softcap).log_softmax(-1)
        kl = (p * (bounded - logq.clamp_min(MIN_LOGPROB))).sum(-1)
    return TokenStats(
        logprob=logp.gather(-1, target.unsqueeze(-1)).squeeze(-1),
        entropy=-(p * bounded).sum(-1) if entropy else None,
        kl=kl,
    )


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficients: Coefficients,
    *,
    positions: Tensor | None = None,
    **options: Any,
) -> PolicyLossOutput:
    """See `alignpro_kernels.policy_loss`; ``positions`` (N,) are those of the rows in the input, None for 0…N−1.

    Other arguments are those of `linear_logprob`.
    """
    stats = linear_logprob(hidden, weight, target, **options)
    constant = TokenStats(*(None if x is None else x.detach() for x in stats))  # type: ignore[arg-type]
    if positions is None:
        positions = torch.arange(stats.logprob.numel(), device=stats.logprob.device)
    if not len(positions):  # no rows, so no call of coefficients
        return PolicyLossOutput(stats.logprob.sum(), *constant)
    flat = TokenStats(*(None if x is None else x.flatten() for x in constant))  # type: ignore[arg-type]
    loss, derivatives = evaluate(coefficients, flat, positions)
    if derivatives[0] is None:
        derivatives = (torch.zeros_like(flat.logprob), *derivatives[1:])
    # Copies, since the backward pass may scale them in place. A derivative of 0 leaves out a row whose log-probability is −∞.
    gradients = [None if x is None else x.clone().view_as(stats.logprob) for x in derivatives]
    return PolicyLossOutput(loss_with_gradients(loss, gradients, stats), *constant)


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    seeds: Tensor,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> SampleOutput:
    """See `alignpro_kernels.linear_sample`."""
    with torch.no_grad():
        z = head_logits(hidden, weight, bias, 1.0, softcap, lora)  # (..., V)
        tau = _column(temperature, z).expand(*z.shape[:-1], 1)
        greedy = tau == 0
        z = z / tau.masked_fill(greedy, 1.0)
        noise = gumbel_noise(seeds, z.shape[-1], z.dtype).masked_fill(greedy, 0.0)
        token = (z + noise).argmax(-1)
        logp = z.log_softmax(-1)
        logprob = logp.gather(-1, token.unsqueeze(-1)).squeeze(-1)
        entropy = -(logp.exp() * logp.clamp_min(MIN_LOGPROB)).sum(-1)
        # At temperature 0 all mass is on one token: logprob and entropy are 0. Where a logit is NaN, there is no such token.
        point = greedy.squeeze(-1) & ~z.isnan().any(-1)
        return SampleOutput(token, logprob.masked_fill(point, 0.0), entropy.masked_fill(point, 0.0))


def merge_states(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> Tensor:
    """See `alignpro_kernels.merge_states`."""
    lse = torch.stack([upcast(part) for part in lses])  # (S, ...)
    # Subtract the maximum by hand: a softmax would give NaN where every part is empty.
    top = lse.amax(0).clamp_min(torch.finfo(lse.dtype).min)
    weights = (lse - top).exp()
    weights = weights / weights.sum(0).clamp_min(torch.finfo(lse.dtype).tiny)
    merged = torch.zeros_like(upcast(outs[0]))
    for out, weight in zip(outs, weights, strict=True):
        column = weight.unsqueeze(-1)
        # An empty part may hold anything, even NaN, whose product with its weight of 0 would be NaN in the backward pass too.
        merged = merged + column * upcast(out).masked_fill(column == 0, 0.0)
    return merged.to(outs[0].dtype)


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    lora: LoRA | None = None,
) -> Tensor:
    """Compute z = softcap(W h + c) / τ, (..., V), float32 (float64 for float64 inputs)."""
    w = upcast(weight)
    if lora is not None:
        w = w + lora.scale * (upcast(lora.b) @ upcast(lora.a))
    u = upcast(hidden) @ w.T
    if bias is not None:
        u = u + upcast(bias)
    if softcap is not None:
        u = softcap * torch.tanh(u / softcap)
    return u / _column(temperature, u)


def _column(temperature: float | Tensor, like: Tensor) -> Tensor:
    """Return τ as (..., 1), or as () if it is the same for all rows."""
    tau = torch.as_tensor(temperature, dtype=like.dtype, device=like.device).detach()
    return tau.unsqueeze(-1) if tau.ndim else tau
