"""Distances between distributions: exact on finite sets, and total variation from samples.

Exact functions take log-probabilities in nats with the outcomes on the last dimension; −inf marks an impossible
outcome.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(p_logprob: Tensor, q_logprob: Tensor) -> Tensor:
    """KL(p || q) = Σ p (log p − log q) in nats, (...,); +inf if p has an outcome that is impossible under q."""
    possible = p_logprob > -torch.inf
    ratio = torch.where(possible, p_logprob, 0.0) - torch.where(possible, q_logprob, 0.0)
    return torch.where(possible, p_logprob.exp() * ratio, 0.0).sum(-1)


def total_variation(p_logprob: Tensor, q_logprob: Tensor) -> Tensor:
    """TV(p, q) = ½ Σ |p − q|, in [0, 1], (...,)."""
    return 0.5 * (p_logprob.exp() - q_logprob.exp()).abs().sum(-1)


def tv_from_logprobs(p_logprob: Tensor, q_logprob: Tensor) -> Tensor:
    """(1 − q(y)/p(y))_+ for each sample y ~ p, a term in [0, 1] whose mean is an unbiased estimate of TV(p, q).

    Args:
        p_logprob: (...,) log p(y) of samples drawn from p, finite; p must be the distribution that was sampled from.
        q_logprob: (...,) log q(y) of the same samples; −inf is allowed.

    Returns:
        (...,) one term per sample: their mean is the estimate, and their spread gives its standard error.

    Raises:
        ValueError: A sample has zero probability under p, or the shapes differ.
    """
    if p_logprob.shape != q_logprob.shape:
        raise ValueError(f"p_logprob has shape {tuple(p_logprob.shape)}, q_logprob {tuple(q_logprob.shape)}")
    if not bool(torch.isfinite(p_logprob).all()):
        raise ValueError("p_logprob is not finite: these samples cannot have been drawn from p")
    return -torch.expm1((q_logprob - p_logprob).clamp_max(0.0))
