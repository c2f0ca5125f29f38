"""The inverse of SplitMix64, which gives seeds with chosen hashes."""

from __future__ import annotations

from alignpro_kernels.noise import GAMMA, MIX_1, MIX_2

MASK = (1 << 64) - 1


def seed_of(output: int) -> int:
    """Return the seed whose first output of SplitMix64 is ``output``, both int64. The mixing is a bijection."""
    z = _unshift(output & MASK, 31) * pow(MIX_2, -1, 1 << 64) & MASK
    z = _unshift(z, 27) * pow(MIX_1, -1, 1 << 64) & MASK
    z = (_unshift(z, 30) - GAMMA) & MASK
    return z - (1 << 64) if z >> 63 else z


def _unshift(z: int, bits: int) -> int:
    """Return the x for which x ^ (x >> bits) is z."""
    x = z
    for _ in range(64 // bits + 1):
        x = z ^ (x >> bits)
    return x
