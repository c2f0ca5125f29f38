"""Stateless noise: Gumbel variates that depend only on (row seed, vocabulary index).

A categorical sample is argmax_v (log p_v + g_v) with g_v standard Gumbel. Because g_v is a hash and not the next number
of a generator, a row's sample does not depend on its batch, on the device, or on the order of computation.
"""

from __future__ import annotations

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as int64
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)


def splitmix64(seeds: Tensor, count: int, start: int = 0) -> Tensor:
    """Return outputs ``start`` to ``start + count`` of SplitMix64 (Steele, Lea and Flood, 2014) for every seed.

    Args:
        seeds: (...,) int64.
        count: Number of outputs per seed.
        start: Number of outputs to skip first.

    Returns:
        (..., count) int64: the bits of the generator's unsigned outputs. Integer products wrap, as the method requires.
    """
    steps = torch.arange(start + 1, start + count + 1, device=seeds.device, dtype=torch.int64) * GAMMA
    z = seeds.unsqueeze(-1) + steps  # (..., count)
    z = (z ^ _shift_right(z, 30)) * MIX_1
    z = (z ^ _shift_right(z, 27)) * MIX_2
    return z ^ _shift_right(z, 31)


def gumbel_noise(seeds: Tensor, vocabulary: int, dtype: torch.dtype = torch.float32, *, start: int = 0) -> Tensor:
    """Return standard Gumbel noise for Gumbel-max sampling: add it to (filtered, scaled) logits and take the argmax.

    The noise is −log(−log u), u = (k + ½) / 2^52 with k the top 52 bits of the hash: exact in float64, so u is never 0
    or 1 and the noise is always finite (53 bits would round the largest k + ½ up to 2^53). The tails reach −3.6 and
    +36.7.

    Args:
        seeds: (...,) int64, one per row.
        vocabulary: V, or the length of a slice of the vocabulary.
        dtype: The dtype of the result; the logarithms are taken in float64.
        start: The vocabulary index at which the slice starts.

    Returns:
        (..., V).
    """
    top = _shift_right(splitmix64(seeds, vocabulary, start), 12)
    uniform = (top.to(torch.float64) + 0.5) * 2.0**-52
    return uniform.log_().neg_().log_().neg_().to(dtype)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift logically: torch's own shift of int64 is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
