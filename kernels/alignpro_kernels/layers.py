"""The element-wise parts of a decoder layer with their gradients, on a CPU: csrc/cpu/norm.cpp and gate.cpp.

Each reads and writes its arguments once per pass. What the backward pass needs is computed again from the inputs, so that
no intermediate result is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignpro_kernels.backends import BackendError, unavailable


class GateGradients(NamedTuple):
    """What the backward pass of a gated MLP needs from its gate, each (..., I)."""

    gate: Tensor
    """The gradient of the gate."""
    up: Tensor
    """The gradient of what it is multiplied with."""
    inner: Tensor
    """silu(gate) · up, computed again."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Compute x / √(mean(x²) + ε) · (weight + offset), differentiable in x and in the weight.

    Args:
        x: (..., D) float32, on the CPU.
        weight: (D,) float32.
        eps: ε.
        offset: 1 for models that store weight − 1.

    Returns:
        (..., D) float32.

    Raises:
        ValueError, TypeError: Shapes or dtypes do not match.
        BackendError: The library of C++ operators is not available.
    """
    _require("rms_norm")
    if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        plain: Tensor = torch.ops.alignpro.rms_norm.default(x, weight, eps, offset)
        return plain
    out: Tensor = _RMSNorm.apply(x, weight, eps, offset)
    return out


def gate(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) · up, (..., I) float32 on the CPU, without gradient (`gate_gradients`).

    Raises:
        ValueError, TypeError: Shapes or dtypes do not match.
        BackendError: The library of C++ operators is not available.
    """
    _require("gate")
    out: Tensor = torch.ops.alignpro.gate.default(gate, up)
    return out


def gate_gradients(gate: Tensor, up: Tensor, gradient: Tensor) -> GateGradients:
    """Compute the gradients of ``gate(gate, up)`` in both arguments from that of its result; all (..., I).

    Raises:
        ValueError, TypeError: Shapes or dtypes do not match.
        BackendError: The library of C++ operators is not available.
    """
    _require("gate_gradients")
    return GateGradients(*torch.ops.alignpro.gate_backward.default(gate, up, gradient))


def _require(name: str) -> None:
    if (reason := unavailable("cpp")) is not None:
        raise BackendError(f"{name}: {reason}")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.offset = eps, offset
        out: Tensor = torch.ops.alignpro.rms_norm.default(x, weight, eps, offset)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = torch.ops.alignpro.rms_norm_backward.default(gradient, x, weight, ctx.eps, ctx.offset)
        if ctx.needs_input_grad[1]:
            scale = x.square().mean(-1, keepdim=True).add_(ctx.eps).rsqrt_()
            d_weight = (gradient * x).mul_(scale).flatten(0, -2).sum(0)
        return d_x, d_weight, None, None
