"""Argument and result types of the head's operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor

Coefficients: TypeAlias = Callable[
    [Tensor, Tensor | None, Tensor | None, Tensor],
    tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
]
"""A loss, evaluated on one chunk at a time: ``(logprob, entropy, kl, rows) -> (loss_terms, alpha, eta, kappa)``.

All are (C,) and constants. ``rows`` (int64) are the chunk's positions in the flattened input. ``alpha``, ``eta`` and
``kappa`` are the derivatives of the loss with respect to the token's log-probability, entropy and KL; None means zero.
``loss_terms`` are summed into the loss: the callback must normalise them itself.
"""


class LoRA(NamedTuple):
    """A LoRA on the head: its weight is W + scale · B A, which is never materialised."""

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
    """−Σ p log p over the vocabulary, if requested."""
    kl: Tensor | None
    """Σ p (log p − log q) over the vocabulary, if a reference is given."""


class PolicyLossOutput(NamedTuple):
    """The loss, and the statistics of every token as constants for the metrics."""

    loss: Tensor
    """() float32 (float64 for float64 inputs); ``loss.backward()`` scales the gradients computed in the forward pass."""
    logprob: Tensor
    """(...,)"""
    entropy: Tensor | None
    """(...,) if requested."""
    kl: Tensor | None
    """(...,) if a reference is given."""


class SampleOutput(NamedTuple):
    """One sampled token per row, with statistics of the distribution it was drawn from."""

    token: Tensor
    """(...,) int64."""
    logprob: Tensor
    """(...,) float32 (float64 for float64 inputs), nats; 0 at temperature 0, where the token is certain."""
    entropy: Tensor
    """(...,) same dtype, nats; 0 at temperature 0."""
