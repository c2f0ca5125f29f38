"""GPUs as their data sheets describe them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU; dense rates, without sparsity."""

    name: str
    bytes_per_s: float
    """Of its memory."""
    flops_per_s: float
    """Of bfloat16 matrix products."""
    memory: int
    """In bytes."""


CARDS = {
    "a100": Card("A100 SXM 80 GB", 2.039e12, 312e12, 80 * 10**9),
    "h100": Card("H100 SXM 80 GB", 3.35e12, 989e12, 80 * 10**9),
    "h200": Card("H200 SXM 141 GB", 4.8e12, 989e12, 141 * 10**9),
}
LAUNCH_SECONDS = 8e-6
"""Assumed time of the host for one eager operation of PyTorch; not measured on these cards."""
REPLAY_SECONDS = 1e-5
"""Assumed time of the host for launching a graph; not measured on these cards."""
POOL_SHARE = 0.5
"""Share of the memory for keys and values; the rest holds the weights of both models, their graphs and the optimizer."""
