"""Parts of kernels: a tile of a product with its operands read once, and logits made of it."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from alignpro_kernels.triton_support import interpreting

# Triton's interpreter multiplies bfloat16 as if it were integers, and cuts float32 off to bfloat16.
INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def tile_position(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a number: rows vary fastest, so that tiles that run together read the same of W.

    At most GROUP row tiles go together, or the hidden states would push each other out of the cache.
    """
    in_group = GROUP * column_tiles
    first = tile // in_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = tile % in_group
    return first + inside % height, inside // height


@triton.jit
def multiply(x, y, acc, PRECISION: tl.constexpr):
    """acc + x y."""
    if INTERPRETED:
        acc = tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 rounded to the nearest of another dtype."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def product(acc, a, b, DEPTH: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """acc + A Bᵀ over the depth; a (BM,) and b (BN,) point at the beginnings of rows, which are contiguous."""
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
    """(acc + A Bᵀ, acc_2 + A₂ Bᵀ), with every tile of B read once for both."""
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
    """τ of rows: one each, or the number of all."""
    if temperatures is not None:
        tau = tl.load(temperatures + row, mask=mask, other=1.0)
    else:
        tau = tl.zeros(row.shape, tl.float32) + temperature
    return tau


@triton.jit
def exp(x):
    """e^x by the device's 2^x, which flushes what is denormal; tl.exp takes three instructions more to keep it."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def tanh(x):
    """tanh with a relative error of 2 ulp (the polynomial is that of Cephes' tanhf); it saturates without overflow."""
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
    """z (BM, BN) of products u with entries of the vocabulary from ``first``: bias, soft-cap, scale (BM,) = 1/τ.

    Beyond the vocabulary it is so small that e^z is 0, and −∞ where a bias may make all of a row −∞.
    """
    column = first + tl.arange(0, u.shape[1])
    if bias is not None:
        u += tl.load(bias + tl.minimum(column, vocabulary - 1)).to(tl.float32)[None, :]
    if softcap is not None:
        u = softcap * tanh(u / softcap)
    u *= scale[:, None]
    if first + u.shape[1] > vocabulary:  # in the last tile only
        if bias is not None:
            u = tl.where(column[None, :] < vocabulary, u, float("-inf"))
        else:
            u = tl.where(column[None, :] < vocabulary, u, -1e30)
    return u


@triton.jit
def halves(x):
    """The left and the right half of a tile (BM, BN): what follows a product takes one at a time, for the registers."""
    left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
    return left, right


@triton.jit
def finite(top):
    """Maxima that may be subtracted: 0 in place of −∞, for −∞ − (−∞) is NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def moment(e, d, INFINITE: tl.constexpr):
    """Σ e·d of rows. INFINITE: d may be −∞ where e is 0, and counts nothing; a NaN in e is seen."""
    if INFINITE:
        return tl.sum(times(e, d), 1)
    return tl.sum(e * d, 1)


@triton.jit
def mean(a, s):
    """a/s; 0 of nothing."""
    return tl.where(s == 0.0, 0.0, a / s)


@triton.jit
def times(weight, x):
    """weight · x, zero where the weight is, whatever x."""
    return tl.where(weight == 0.0, 0.0, weight * x)
