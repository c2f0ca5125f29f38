"""Other parts of the Triton backend, interpreted: products, merged attention states, 64-bit offsets."""

import pytest
import torch
import triton
import triton.language as tl
from cases import HALF_AND_SINGLE
from torch import Tensor

from alignpro_kernels import reference, triton_head
from alignpro_kernels.head import Head
from alignpro_kernels.triton_gradient import accumulate_kernel


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 40), (2, 11, 3, 64), (5, 7, 300), (3, 1, 1)])
def test_merged_states(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    outs = torch.randn(shape, generator=g).to(dtype)
    lses = torch.randn(shape[:-1], generator=g) * 4
    merged = triton_head.merge_states(outs, lses)
    exact = reference.merge_states(outs.double(), lses.double())
    usual = reference.merge_states(outs, lses)
    assert merged.dtype == dtype
    assert (merged - exact).abs().max() <= 1.5 * (usual - exact).abs().max() + 1e-6


def test_empty_sets_are_ignored() -> None:
    g = torch.Generator().manual_seed(0)
    outs = list(torch.randn(3, 4, 8, generator=g))
    lses = list(torch.randn(3, 4, generator=g))
    lses[1][0] = lses[1][1] = lses[0][1] = lses[2][1] = -torch.inf
    outs[1][0] = torch.nan
    for part in outs:
        part[1] = torch.nan
    merged = triton_head.merge_states(outs, lses)
    torch.testing.assert_close(merged, reference.merge_states(outs, lses), rtol=0, atol=1e-6)
    assert (merged[1] == 0).all()


def test_states_that_require_a_gradient() -> None:
    outs, lses = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3)
    triton_head.merge_states(outs, lses).sum().backward()
    assert outs.grad is not None


def test_no_states() -> None:
    assert triton_head.merge_states(torch.empty(2, 0, 8), torch.empty(2, 0)).shape == (0, 8)


@triton.jit
def _dot_kernel(a, b, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M)[:, None], tl.arange(0, K), tl.arange(0, N)[None, :]
    x, y = tl.load(a + m * K + k[None, :]), tl.load(b + k[:, None] * N + n)
    tl.store(out + m * N + n, tl.dot(x, y, input_precision="ieee"))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 64), (64, 1), (2, 16), (16, 8)])
def test_products_have_the_same_bits_in_every_shape(rows: int, columns: int) -> None:
    """The interpreter's own product does not: see conftest."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 32, generator=g), torch.randn(32, 64, generator=g)

    def product(a: Tensor, b: Tensor) -> Tensor:
        out = torch.empty(len(a), b.shape[1])
        _dot_kernel[(1,)](a.contiguous(), b.contiguous(), out, M=len(a), K=32, N=b.shape[1])
        return out

    assert torch.equal(product(a[:rows], b[:, :columns]), product(a, b)[:rows, :columns])


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_sum_of_products(dtype: torch.dtype, add: bool) -> None:
    g = torch.Generator().manual_seed(0)
    du = torch.randn(21, 128, generator=g).to(dtype)[:, :70]  # the row stride is larger than the vocabulary
    x = torch.randn(21, 37, generator=g).to(dtype)
    total = torch.ones(70, 37) if add else torch.full((70, 37), torch.nan)
    shape = {"BM": 32, "BN": 16, "BK": 16}
    accumulate_kernel[(3 * 3,)](
        total, du, x, torch.tensor(0.5), 21, 70, du.stride(0), D=37, ADD=add, PRECISION="ieee", **shape
    )
    expected = 0.5 * du.double().T @ x.double() + add
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=3e-6)


@triton.jit
def _offsets_kernel(out, row_tile, column_tile, stride, BM: tl.constexpr, BN: tl.constexpr):
    corner = (row_tile * BM).to(tl.int64) * stride + column_tile * BN
    offset = tl.arange(0, BM)[:, None] * stride + tl.arange(0, BN)[None, :]
    tl.store(out + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], corner + offset)


def test_offsets_pass_two_gigabytes() -> None:
    """Computed as in the kernels: rows times vocabulary exceeds 2³¹."""
    out = torch.empty(4, 8, dtype=torch.int64)
    _offsets_kernel[(1,)](out, 4000, 30000, 262144, BM=4, BN=8)
    rows, columns = torch.arange(16000, 16004), torch.arange(240000, 240008)
    assert torch.equal(out, rows[:, None] * 262144 + columns)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("vocabulary", [32064, 151936, 262144])
@pytest.mark.parametrize("reference_head", [False, True])
def test_chunks_stay_within_the_budget(dtype: torch.dtype, vocabulary: int, reference_head: bool) -> None:
    weight = torch.empty(vocabulary, 8, device="meta")
    head = Head(weight, ref_weight=weight if reference_head else None)
    rows = triton_head.max_chunk_rows(head, dtype)
    assert rows % 128 == 0 and 512 <= rows <= 8192
    assert rows * head.logits_per_row * dtype.itemsize <= 1.25 * 2**30
