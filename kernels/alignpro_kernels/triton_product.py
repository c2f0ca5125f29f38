"""Building blocks of the kernels: tiled matrix products, logits computed from them, and elementwise functions."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from alignpro_kernels.triton_support import interpreting

# Triton's interpreter multiplies bfloat16 as if it were integers, and truncates float32 when converting it to bfloat16.
INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def tile_position(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Map a tile's number to (row tile, column tile); rows vary fastest, so that concurrent tiles read the same part of W.

    At most GROUP row tiles run side by side, since more would evict each other's hidden states from the cache.
    """
    in_group = GROUP * column_tiles
    first = tile // in_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = tile % in_group
    return first + inside % height, inside // height


@triton.jit
def multiply(x, y, acc, PRECISION: tl.constexpr):
    """Return acc + x y."""
    if INTERPRETED:
        acc = tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def downcast(x, dtype: tl.constexpr):
    """Round float32 to the nearest value of another dtype."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def product(acc, a, b, DEPTH: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + A Bᵀ, summed over DEPTH; a (BM,) and b (BN,) point to the starts of rows, which are contiguous."""
    k = tl.arange(0, BK)
    a = a[:, None] + k[None, :]  # (BM, BK)
    b = b[None, :] + k[:, None]  # (BK, BN)
    for start in range(0, DEPTH, BK):
        if DEPTH % BK == 0:
            x = tl.load(a)
            y = tl.load(b)
        else:
            x = tl.load(a, mask=k[None, :] < DEPTH - start, other=0.0)
            y = tl.load(b, mask=k[:, None] < DEPTH - start, other=0.0)
        acc = multiply(x, y, acc, PRECISION)
        a += BK
        b += BK
    return acc


@triton.jit
def shared_product(acc, acc_2, a, a_2, b, DEPTH: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """Return (acc + A Bᵀ, acc_2 + A₂ Bᵀ), reading every tile of B once for both."""
    k = tl.arange(0, BK)
    a = a[:, None] + k[None, :]
    a_2 = a_2[:, None] + k[None, :]
    b = b[None, :] + k[:, None]
    for start in range(0, DEPTH, BK):
        if DEPTH % BK == 0:
            x = tl.load(a)
            x_2 = tl.load(a_2)
            y = tl.load(b)
        else:
            x = tl.load(a, mask=k[None, :] < DEPTH - start, other=0.0)
            x_2 = tl.load(a_2, mask=k[None, :] < DEPTH - start, other=0.0)
            y = tl.load(b, mask=k[:, None] < DEPTH - start, other=0.0)
        acc = multiply(x, y, acc, PRECISION)
        acc_2 = multiply(x_2, y, acc_2, PRECISION)
        a += BK
        a_2 += BK
        b += BK
    return acc, acc_2


@triton.jit
def row_temperature(temperatures, temperature, row, mask):
    """Return τ per row, from ``temperatures`` if given, otherwise the common ``temperature``."""
    if temperatures is not None:
        tau = tl.load(temperatures + row, mask=mask, other=1.0)
    else:
        tau = tl.zeros(row.shape, tl.float32) + temperature
    return tau


@triton.jit
def exp(x):
    """Compute e^x by the device's 2^x, which flushes denormals to 0; tl.exp takes three more instructions to keep them."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def tanh(x):
    """Compute tanh with a relative error of 2 ulp (Cephes' tanhf polynomial); it saturates without overflow."""
    square = x * x
    small = -5.70498872745e-3
    small = small * square + 2.06390887954e-2
    small = small * square - 5.37397155531e-2
    small = small * square + 1.33314422036e-1
    small = small * square - 3.33332819422e-1
    small = small * square * x + x
    size = tl.abs(x)
    decay = exp(-2.0 * size)
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(size < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def logits(u, bias, first, vocabulary, softcap, scale):
    """Turn products u (BM, BN) with vocabulary entries from ``first`` into z: bias, soft-cap, scale (BM,) = 1/τ.

    Beyond the vocabulary z is so small that e^z is 0, or −∞ with a bias, which may itself make a whole row −∞.
    """
    column = first + tl.arange(0, u.shape[1])
    if bias is not None:
        u += tl.load(bias + tl.minimum(column, vocabulary - 1)).to(tl.float32)[None, :]
    if softcap is not None:
        u = softcap * tanh(u / softcap)
    u *= scale[:, None]
    if first + u.shape[1] > vocabulary:  # only in the last tile
        if bias is not None:
            u = tl.where(column[None, :] < vocabulary, u, float("-inf"))
        else:
            u = tl.where(column[None, :] < vocabulary, u, -1e30)
    return u


@triton.jit
def split_columns(x):
    """Split a tile (BM, BN) into its left and right half, which are processed one after the other to save registers."""
    left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
    return left, right


@triton.jit
def finite(top):
    """Make maxima safe to subtract: replace −∞ by 0, since −∞ − (−∞) is NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def moment(e, d, INFINITE: tl.constexpr):
    """Return Σ e·d per row. INFINITE: d may be −∞ where e is 0, which contributes 0; a NaN in e propagates."""
    if INFINITE:
        return tl.sum(mul_or_zero(e, d), 1)
    return tl.sum(e * d, 1)


@triton.jit
def mean(a, s):
    """Return a/s, or 0 where s is 0."""
    return tl.where(s == 0.0, 0.0, a / s)


@triton.jit
def mul_or_zero(weight, x):
    """Return weight · x, or 0 where the weight is 0, whatever x is."""
    return tl.where(weight == 0.0, 0.0, weight * x)
