"""Mixtures of prompters that were trained from one ρ_sft with one λ, each for its own reward; and one prompter at every λ.

With g_k(x') = log (ρ_k/ρ_sft)(x'|x), the normalised reward of prompter k in units of λ, which needs no reward model:

    ρ_w ∝ ρ_sft exp(Σ_k w_k g_k)            F(w) = E_x log E_{x'~ρ_sft} exp(Σ_k w_k g_k(x'))

If each ρ_k is optimal for its reward, ρ_w is optimal for Σ_k w_k r_k. F is convex, F(e_k) = 0, F ≤ 0 on the simplex, and
∂F/∂w_k = E_x E_{ρ_w} g_k. F(w) is the maximum over all ρ of E_ρ Σ_k w_k g_k − KL(ρ ‖ ρ_sft). So the weights that minimise it
are those of the max-min mixture, which maximises the least of the normalised rewards E_ρ g_k, less the KL.

With a single prompter, w = s is a dial: if ρ is optimal for λ, then ρ_sft^{1−s} ρ^s, normalised over sequences, is optimal
for λ/s.

Log-probabilities are in nats; the last dimension of exact functions indexes rewrites, −inf marks an impossible one.
Source: mixing preference optimisation (Wang et al., 2025, arXiv 2502.18699); the dial is its case K = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def mixture_policy(reference: Tensor, prompters: Tensor, weights: Tensor) -> Tensor:
    """log ρ_w(x'|x), (..., C).

    Args:
        reference: (..., C) log ρ_sft.
        prompters: (K, ..., C) log ρ_k.
        weights: (K,) w; any real numbers.
    """
    tilted = _tilted(reference, prompters, weights)
    return tilted - tilted.logsumexp(-1, keepdim=True)


def mixture_value(reference: Tensor, prompters: Tensor, weights: Tensor) -> Tensor:
    """F(w), (), nats, the mean over prompts; arguments as `mixture_policy`."""
    return _tilted(reference, prompters, weights).logsumexp(-1).mean()


def mixture_gradient(reference: Tensor, prompters: Tensor, weights: Tensor) -> Tensor:
    """∂F/∂w_k = E_x E_{ρ_w} g_k, (K,), nats; arguments as `mixture_policy`."""
    mixed = mixture_policy(reference, prompters, weights).exp()  # (..., C)
    ratios = _log_ratios(reference, prompters)
    return (mixed * ratios.where(mixed > 0, 0.0)).sum(-1).flatten(1).mean(1)


def dial(reference: Tensor, prompter: Tensor, strength: float) -> Tensor:
    """log of ρ_sft^{1−s} ρ^s, normalised, (..., C): optimal for λ/s if ρ is for λ.

    Args:
        reference: (..., C) log ρ_sft.
        prompter: (..., C) log ρ.
        strength: s; 0 gives ρ_sft and 1 gives ρ.
    """
    return mixture_policy(reference, prompter.unsqueeze(0), torch.tensor([strength], dtype=reference.dtype))


@dataclass(frozen=True)
class SampledMixture:
    """Estimates at weights w from m rewrites to each of P prompts."""

    value: Tensor
    """() F̂ = mean over prompts of log (1/m) Σ exp(Σ_k w_k g_k); on average at most F, which it approaches as m grows."""
    gradient: Tensor
    """(K,) self-normalised estimate of ∂F/∂w, of bias O(1/m)."""
    effective_sample_size: Tensor
    """(P,) 1 / Σ W² of the normalised weights of a prompt's rewrites, in [1, m]."""


def sampled_mixture(log_ratios: Tensor, weights: Tensor, shares: Tensor | None = None) -> SampledMixture:
    """Estimate F and its gradient.

    Rewrites of ρ_sft alone hold little of what prompters far from it write: of m of them, F̂ at a prompter alone is about
    log m less its KL, if that is greater, and not 0. If each prompter writes a share of the rewrites, the weights of the
    balance heuristic (Veach and Guibas, 1995), ρ_sft exp(Σ_k w_k g_k) over the mean of the densities, are at most the
    inverse of the least share for every w on the simplex: a weighted geometric mean is at most an arithmetic one.

    Args:
        log_ratios: (P, m, K) g_k of the rewrites.
        weights: (K,) w.
        shares: (1 + K,) of the rewrites, which ρ_sft and each prompter has drawn, of sum 1; by default ρ_sft all of them.
    """
    exponents = log_ratios @ weights  # (P, m)
    if shares is not None:
        densities = torch.cat([torch.zeros_like(log_ratios[..., :1]), log_ratios], -1)  # (P, m, 1 + K), over ρ_sft
        exponents = exponents - (densities + shares.to(densities).log()).logsumexp(-1)
    normalised = exponents.softmax(1)
    return SampledMixture(
        value=(exponents.logsumexp(1) - math.log(exponents.shape[1])).mean(),
        gradient=(normalised.unsqueeze(2) * log_ratios).sum(1).mean(0),
        effective_sample_size=1.0 / normalised.square().sum(1),
    )


def mirror_descent(
    draw: Callable[[int], Tensor],
    prompters: int,
    *,
    shares: Tensor | None = None,
    steps: int = 400,
    step_size: float = 2.0,
) -> Tensor:
    """Minimise F over the simplex by stochastic mirror descent with the entropy as its mirror map, from equal weights.

    Each step multiplies w_k by exp(−η v_k), where v is the gradient that `sampled_mixture` estimates, and normalises. η is
    ``step_size`` over the root of the sum of (max_k v_k − min_k v_k)² of all steps so far (Auer, Cesa-Bianchi and Gentile, 2002):
    the curvature of F grows with the square of how far prompters are apart in nats, and steps of a fixed size go back and forth
    between the corners of the simplex, whose average is not the minimum. The result is the average of the iterates of the
    second half, in which those of the way there do not count (suffix averaging; Rakhlin, Shamir and Sridharan, 2012).

    Args:
        draw: Step → (P, m, K) g_k of rewrites to that step's prompts.
        prompters: K.
        shares: Who has drawn them, as in `sampled_mixture`.
        steps: Number of steps, at least 2.
        step_size: How far the first step moves the logarithm of a ratio of two weights, at most.

    Returns:
        (K,) float64, at least 0, of sum 1.

    Raises:
        ValueError: ``steps`` is less than 2, or a log ratio is not finite.
    """
    if steps < 2:
        raise ValueError(f"mirror_descent: steps={steps}: expected at least 2")
    log_weights = torch.full((prompters,), -math.log(prompters), dtype=torch.float64)
    total = torch.zeros_like(log_weights)
    spreads = 0.0  # Σ (max_k v_k − min_k v_k)²
    for step in range(steps):
        log_ratios = draw(step).double()
        if not bool(log_ratios.isfinite().all()):
            raise ValueError(f"mirror_descent: a log ratio of step {step} is not finite")
        gradient = sampled_mixture(log_ratios, log_weights.exp(), shares).gradient
        spreads += (gradient.max() - gradient.min()).item() ** 2
        if spreads > 0:
            log_weights = (log_weights - step_size / math.sqrt(spreads) * gradient).log_softmax(0)
        if step >= steps // 2:
            total += log_weights.exp()
    return total / total.sum()


@dataclass(frozen=True)
class Correction:
    """The weights by which N draws of a proposal q become draws of another distribution p, and how far apart both are."""

    weights: Tensor
    """(..., N): the probability of keeping each; in proportion to p/q."""
    effective_sample_size: Tensor
    """(...,) 1 / Σ W², in [1, N]; near 1, a single draw carries all the weight, and N is too small."""
    kl: Tensor
    """(...,) estimate of KL(q ‖ p), nats, at least 0."""
    total_variation: Tensor
    """(...,) estimate of TV(q, p), in [0, 1)."""


def correction(log_density: Tensor, log_proposal: Tensor) -> Correction:
    """Weigh draws of q by p/q, up to a constant (sampling-importance-resampling; Rubin, 1987).

    Resampled by these weights, the draws are distributed as p as N grows. Both distances use the mean of p/q over the draws
    in place of its expectation, and are biased by O(1/N).

    Args:
        log_density: (..., N) log p of the draws, up to a constant for each row.
        log_proposal: (..., N) log q of the draws, finite.

    Raises:
        ValueError: The shapes differ, or a draw is impossible under q.
    """
    if log_density.shape != log_proposal.shape:
        raise ValueError(f"log_density has shape {tuple(log_density.shape)}, log_proposal {tuple(log_proposal.shape)}")
    if not bool(torch.isfinite(log_proposal).all()):
        raise ValueError("log_proposal is not finite: these draws cannot be of the proposal")
    log_weights = (log_density - log_proposal).log_softmax(-1)
    relative = log_weights + math.log(log_weights.shape[-1])  # log p/q
    weights = log_weights.exp()
    return Correction(
        weights=weights,
        effective_sample_size=1.0 / weights.square().sum(-1),
        kl=-relative.mean(-1),
        total_variation=-torch.expm1(relative.clamp_max(0.0)).mean(-1),
    )


def _log_ratios(reference: Tensor, prompters: Tensor) -> Tensor:
    """g_k, (K, ..., C); 0 where a rewrite is impossible, since prompters that started from ρ_sft cannot draw it either."""
    possible = reference > -torch.inf
    return torch.where(possible, prompters - torch.where(possible, reference, 0.0), 0.0)


def _tilted(reference: Tensor, prompters: Tensor, weights: Tensor) -> Tensor:
    """log ρ_sft + Σ_k w_k g_k, (..., C), with 0 · (−∞) = 0: a prompter of weight 0 forbids nothing."""
    ratios = _log_ratios(reference, prompters)
    counted = (weights != 0).view(-1, *[1] * (ratios.dim() - 1)) | ratios.isfinite()
    return reference + torch.tensordot(weights, ratios.where(counted, 0.0), dims=1)
