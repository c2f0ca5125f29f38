"""Sampling fused into the head's product: noise is added to a tile's logits, and only the tile's best entry is stored.

The statistics of the distribution are computed from the same sums as in `triton_logits`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from alignpro_kernels import noise
from alignpro_kernels.triton_configs import SAMPLES, prune_sample_configs
from alignpro_kernels.triton_product import (
    exp,
    finite,
    logits,
    moment,
    mul_or_zero,
    product,
    row_temperature,
    tile_position,
)

GAMMA = tl.constexpr(noise.GAMMA + (1 << 64))
MIX_1 = tl.constexpr(noise.MIX_1 + (1 << 64))
MIX_2 = tl.constexpr(noise.MIX_2 + (1 << 64))
LOW_52 = tl.constexpr((1 << 52) - 1)
HALF = tl.constexpr(1 << 51)
NOWHERE = tl.constexpr(1 << 30)  # an index beyond any vocabulary


@triton.jit
def gumbel(seed, index):
    """Return entry ``index`` of `noise.gumbel_noise` for a seed, in float32, accurate to about 1e-6.

    With u = (k + ½)/2⁵², the noise is −log E with E = −log u. Near u = 1, E is tiny and float32 cannot represent u. There
    v = 1 − u is computed from the complement of the integer, and E = −log(1 − v) = 2 artanh(v/(2 − v)) from a series, with a
    relative error of 1e-7 for all v ≤ ½.
    """
    z = seed.to(tl.uint64, bitcast=True) + (index + 1).to(tl.uint64) * GAMMA
    z = (z ^ (z >> 30)) * MIX_1
    z = (z ^ (z >> 27)) * MIX_2
    k = ((z ^ (z >> 31)) >> 12).to(tl.int64)
    upper = k >= HALF
    x = (tl.where(upper, LOW_52 - k, k).to(tl.float32) + 0.5) * (1.0 / (1 << 52))  # v where u ≥ ½, else u
    r = x / (2.0 - x)
    square = r * r
    series = 1.0 / 13.0
    series = series * square + 1.0 / 11.0
    series = series * square + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    series = series * square + 1.0
    return -tl.log(tl.where(upper, 2.0 * r * series, -tl.log(x)))


@triton.jit
def noise_kernel(seeds, out, vocabulary, BV: tl.constexpr):
    """Compute only the noise (C, V), one program per row."""
    row = tl.program_id(0).to(tl.int64)
    seed = tl.load(seeds + row)
    for first in range(0, vocabulary, BV):
        column = first + tl.arange(0, BV)
        tl.store(out + row * vocabulary + column, gumbel(seed, column), mask=column < vocabulary)


@triton.autotune(
    SAMPLES,
    key=["rows_key", "vocabulary", "D", "R"],
    prune_configs_by={"early_config_prune": prune_sample_configs},
    cache_results=True,
)
@triton.jit(do_not_specialize=["rows", "rows_key"])
def sample_kernel(
    hidden,  # (C, D)
    weight,  # (V, D)
    bias,  # (V,) | None
    lora_hidden,  # (C, R) | None
    lora_b,  # (V, R) | None
    temperatures,  # (C,) float32 | None; 0 is greedy
    seeds,  # (C,) int64
    partials,  # (best noisy value, its z, m, s, a; tiles, C) float32, out
    best,  # (tiles, C) int32, out: index of the best
    width,  # (1,) int32, out: BN
    rows,
    vocabulary,
    plane_stride,
    temperature,
    softcap,  # float | None
    rows_key,
    D: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    WAVES: tl.constexpr,
):
    """Sample within one tile per program, or per iteration of a persistent one, as in `logits_kernel`."""
    row_tiles = tl.cdiv(rows, BM)
    column_tiles = tl.cdiv(vocabulary, BN)
    if tl.program_id(0) == 0:
        tl.store(width, BN)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = tile_position(tile, row_tiles, column_tiles, GROUP)
        row = row_tile * BM + tl.arange(0, BM)
        valid = row < rows
        row = tl.minimum(row, rows - 1)
        column = column_tile * BN + tl.arange(0, BN)
        clamped = tl.minimum(column, vocabulary - 1).to(tl.int64)
        long_row = row.to(tl.int64)
        u = tl.zeros((BM, BN), tl.float32)
        u = product(u, hidden + long_row * D, weight + clamped * D, D, BK, PRECISION)
        if R > 0:
            RANK: tl.constexpr = 16 if R <= 16 else 32
            u = product(u, lora_hidden + long_row * R, lora_b + clamped * R, R, RANK, PRECISION)
        tau = row_temperature(temperatures, temperature, row, valid)
        greedy = tau == 0.0
        z = logits(u, bias, column_tile * BN, vocabulary, softcap, 1.0 / tl.where(greedy, 1.0, tau))
        top = tl.max(z, 1)
        d = z - finite(top)[:, None]
        e = exp(d)
        total = tl.sum(e, 1)
        a = moment(e, d, bias is not None)

        noisy = z + tl.where(greedy[:, None], 0.0, gumbel(tl.load(seeds + row)[:, None], column[None, :]))
        noisy = tl.where(noisy != noisy, float("inf"), noisy)  # NaN wins, as in torch.argmax
        value = tl.max(noisy, 1)
        index = tl.min(tl.where(noisy == value[:, None], column[None, :], NOWHERE), 1)  # ties: the lowest index
        plane = partials + column_tile.to(tl.int64) * rows + row
        tl.store(plane, value, mask=valid)
        plane += plane_stride
        tl.store(plane, tl.sum(tl.where(column[None, :] == index[:, None], z, 0.0), 1), mask=valid)
        plane += plane_stride
        tl.store(plane, top, mask=valid)
        plane += plane_stride
        tl.store(plane, total, mask=valid)
        plane += plane_stride
        tl.store(plane, a, mask=valid)
        tl.store(best + column_tile.to(tl.int64) * rows + row, index, mask=valid)


@triton.jit(do_not_specialize=["rows"])
def choice_kernel(
    partials,  # (5, tiles, C) of `sample_kernel`
    best,  # (tiles, C) int32
    width,  # (1,)
    temperatures,  # (C,) float32 | None
    token,  # (C,) int64, out
    logprob,  # (C,) out
    entropy,  # (C,) out
    rows,
    vocabulary,
    plane_stride,
    temperature,
    BR: tl.constexpr,
    BT: tl.constexpr,
):
    """Choose the best of the tiles' best entries and merge the statistics, for BR rows."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    valid = row < rows
    tiles = tl.cdiv(vocabulary, tl.load(width))
    value = tl.full((BR,), float("-inf"), tl.float32)
    index = tl.full((BR,), NOWHERE, tl.int32)
    z = tl.zeros((BR,), tl.float32)
    top = tl.full((BR,), float("-inf"), tl.float32)
    s = tl.zeros((BR,), tl.float32)
    a = tl.zeros((BR,), tl.float32)
    for first in range(0, tiles, BT):
        tile = first + tl.arange(0, BT)
        mask = (tile < tiles)[:, None] & valid[None, :]
        pointers = tile.to(tl.int64)[:, None] * rows + row[None, :]
        value_t = tl.load(partials + pointers, mask=mask, other=float("-inf"))
        z_t = tl.load(partials + plane_stride + pointers, mask=mask, other=0.0)
        index_t = tl.load(best + pointers, mask=mask, other=NOWHERE)
        here = tl.max(value_t, 0)
        index_here = tl.min(tl.where(value_t == here[None, :], index_t, NOWHERE), 0)
        z_here = tl.sum(tl.where(index_t == index_here[None, :], z_t, 0.0), 0)
        better = (here > value) | (index == NOWHERE)  # ties: the earlier tile, which has the lower index
        value = tl.where(better, here, value)
        index = tl.where(better, index_here, index)
        z = tl.where(better, z_here, z)

        m_t = tl.load(partials + 2 * plane_stride + pointers, mask=mask, other=float("-inf"))
        s_t = tl.load(partials + 3 * plane_stride + pointers, mask=mask, other=0.0)
        a_t = tl.load(partials + 4 * plane_stride + pointers, mask=mask, other=0.0)
        before = top
        top = tl.maximum(before, tl.max(m_t, 0))
        old = exp(before - finite(top))
        new = exp(m_t - finite(top)[None, :])
        a = mul_or_zero(old, a + mul_or_zero(s, before - finite(top)))
        a += tl.sum(mul_or_zero(new, a_t + mul_or_zero(s_t, m_t - finite(top)[None, :])), 0)
        s = old * s + tl.sum(new * s_t, 0)
    point = (row_temperature(temperatures, temperature, row, valid) == 0.0) & (s == s)  # not where a logit is NaN
    log_s = tl.log(s)
    tl.store(token + row, index.to(tl.int64), mask=valid)
    tl.store(logprob + row, tl.where(point, 0.0, z - finite(top) - log_s), mask=valid)
    tl.store(entropy + row, tl.where(point, 0.0, log_s - a / s), mask=valid)
