"""What the head's operators take and give."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor

Coefficients: TypeAlias = Callable[
    [Tensor, Tensor | None, Tensor | None, Tensor],
    tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
]
"""A loss, a chunk at a time: ``(logprob, entropy, kl, rows) -> (loss_terms, alpha, eta, kappa)``.

All are (C,) and constants. ``rows`` (int64) are the chunk's positions in the flattened input. ``alpha``, ``eta`` and
``kappa`` are the derivatives of the loss in the token's log-probability, entropy and KL; None stands for zero.
``loss_terms`` are summed into the loss: normalise inside.
"""


class LoRA(NamedTuple):
    """A LoRA on the head: its weight is W + scale · B A, which is never formed."""

    a: Tensor
    """(r, D)"""
    b: Tensor
    """(V, r)"""
    scale: float


class TokenStats(NamedTuple):
    """Statistics of every token, (...,) float32 (float64 for float64 inputs), in nats, differentiable."""

    logprob: Tensor
    """log p(target)."""
    entropy: Tensor | None
    """−Σ p log p over the vocabulary, where asked for."""
    kl: Tensor | None
    """Σ p (log p − log q) over the vocabulary, where a reference is given."""


class PolicyLossOutput(NamedTuple):
    """The loss, and the statistics of every token as constants for the metrics."""

    loss: Tensor
    """() float32 (float64 for float64 inputs); ``loss.backward()`` scales the gradients made in the forward pass."""
    logprob: Tensor
    """(...,)"""
    entropy: Tensor | None
    """(...,) where asked for."""
    kl: Tensor | None
    """(...,) where a reference is given."""


class SampleOutput(NamedTuple):
    """A sampled token a row, with statistics of the distribution it was drawn from."""

    token: Tensor
    """(...,) int64."""
    logprob: Tensor
    """(...,) float32 (float64 for float64 inputs), nats; 0 at temperature 0, where the distribution is one point."""
    entropy: Tensor
    """(...,) same dtype, nats; 0 at temperature 0."""
