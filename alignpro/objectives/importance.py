"""Importance weights: samples of an earlier policy μ stand for samples of the current policy ρ.

    w(x') = ρ(x'|x) / μ(x'|x) = exp Σ_t (log ρ − log μ)(a_t|s_t)        E_{x'~μ} w(x') g(x') = E_{x'~ρ} g(x')

for every function g of one sequence, since μ > 0 wherever ρ > 0. So if all terms of a row are multiplied by its weight (the
advantage, the KL and the entropy bonus alike), the expected gradient is that of samples of ρ itself. What a row takes from the
other rows of its prompt may only be a baseline: those rows are independent of it, and E_{x'~μ} w ∇log ρ(a_t|s_t) b = b
E_{x'~ρ} ∇log ρ(a_t|s_t) = 0 for every b that does not depend on it, so that the baseline itself needs no weights.

The weights are those of whole sequences. The ratio of a single token corrects the choice of that token but not of the state
in which it was made, and its gradient is not ∇J.

A limit c bounds the variance (Ionides, 2008, "Truncated importance sampling"). With min(w, c) in place of w the expectation
is E_{x'~ρ} g − E_{x'~μ} (w − c)⁺ g: the bias is at most E_{x'~μ} (w − c)⁺ · max |g|, and vanishes where no weight exceeds c.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ImportanceWeights(NamedTuple):
    """The weights of B rows."""

    weights: Tensor
    """(B,) min(w, c)."""
    excess: Tensor
    """(B,) (w − c)⁺, what the limit took away."""


def importance_weights(
    logprob: Tensor, sampled_logprob: Tensor, mask: Tensor, limit: float | None = None
) -> ImportanceWeights:
    """Compute the weight of each row.

    Args:
        logprob: (B, T) log ρ(a_t|s_t), nats.
        sampled_logprob: (B, T) log μ(a_t|s_t), of the distribution from which the actions were drawn.
        mask: (B, T) bool, True at the actions.
        limit: c ≥ 1; None for no limit, which leaves the expectation unbiased.

    Raises:
        ValueError: Shapes do not match.
    """
    if not logprob.shape == sampled_logprob.shape == mask.shape:
        raise ValueError(
            f"importance_weights: logprob {tuple(logprob.shape)}, sampled_logprob {tuple(sampled_logprob.shape)}, mask "
            f"{tuple(mask.shape)}: expected (B, T) for each"
        )
    change = logprob.detach() - sampled_logprob.to(logprob)
    ratio = torch.where(mask, change, 0.0).sum(1).exp()  # (B,)
    weights = ratio if limit is None else ratio.clamp(max=limit)
    return ImportanceWeights(weights, ratio - weights)


def effective_sample_share(weights: Tensor) -> float:
    """(Σ w)² / (B Σ w²): the share of B samples of ρ that would vary as little as these (Kong, 1992); 1 for equal weights.

    Args:
        weights: (B,).
    """
    squares = weights.square().sum()
    return (weights.sum().square() / (len(weights) * squares)).item() if squares > 0 else 0.0
