"""Norms and gates with gradients on a CPU: as close to float64 as plain PyTorch in the same dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alignpro_kernels import backends
from alignpro_kernels.layers import gate, gate_gradients, rms_norm

pytestmark = pytest.mark.skipif("no C++ compiler found" in (backends()["cpp"] or ""), reason="no C++ compiler")

RATIO = 1.5
"""The error against float64 that is allowed, relative to that of plain PyTorch."""


def plain_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + offset)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max())


def check(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    assert found.dtype == torch.float32 and found.shape == exact.shape
    assert error(found, exact) <= RATIO * error(plain, exact) + 1e-6 * float(exact.abs().max())


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 37), (1, 7), (4, 576)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e-3])
def test_a_norm_and_its_gradient_are_as_exact_as_plain_ones(
    shape: tuple[int, ...], offset: float, scale: float
) -> None:
    torch.manual_seed(0)
    x, weight, upstream = scale * torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape)
    eps = 1e-5
    results = []
    for dtype, norm in ((torch.float32, rms_norm), (torch.float32, plain_norm), (torch.float64, plain_norm)):
        inputs = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        out = norm(*inputs, eps, offset)
        results.append((out.detach(), *torch.autograd.grad(out, inputs, upstream.to(dtype))))
    for ours, plain, exact in zip(*results, strict=True):
        check(ours, plain, exact)
    with torch.no_grad():
        assert torch.equal(rms_norm(x.detach(), weight, eps, offset), results[0][0])


def test_a_norm_takes_a_gradient_that_is_not_contiguous() -> None:
    x = torch.randn(6, 64, requires_grad=True)
    weight, upstream = torch.randn(64), torch.randn(64, 6).T
    (found,) = torch.autograd.grad(rms_norm(x, weight, 1e-6), x, upstream)
    (expected,) = torch.autograd.grad(plain_norm(x, weight, 1e-6, 0.0), x, upstream)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(3, 96), (1, 5), (7, 1027)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_gate_and_its_gradients_are_as_exact_as_plain_ones(shape: tuple[int, ...], scale: float) -> None:
    torch.manual_seed(0)
    g, u, upstream = scale * torch.randn(shape), torch.randn(shape), torch.randn(shape)
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (g, u)]
        out = torch.nn.functional.silu(inputs[0]) * inputs[1]
        results.append((*torch.autograd.grad(out, inputs, upstream.to(dtype)), out.detach()))
    plain, exact = results
    for found, other, true in zip(gate_gradients(g, u, upstream), plain, exact, strict=True):
        check(found, other, true)
    check(gate(g, u), plain[2], exact[2])


def test_a_gate_far_from_zero_has_the_limits_of_silu() -> None:
    far, one = torch.tensor([-200.0, -95.0, 95.0, 200.0]), torch.ones(4)
    found = gate_gradients(far, one, one)
    expected = torch.tensor([0.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(found.gate, expected, rtol=0, atol=1e-30)
    torch.testing.assert_close(found.inner, far * expected, rtol=0, atol=1e-30)


def test_shapes_and_dtypes_that_do_not_match_are_refused() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match="rows of 8"):
        rms_norm(x, torch.ones(9), 1e-6)
    with pytest.raises(ValueError, match="differ"):
        gate(x, x[:1])
    with pytest.raises(TypeError, match="float32"):
        gate_gradients(x, x, x.double())
