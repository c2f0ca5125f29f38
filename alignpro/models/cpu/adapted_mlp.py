"""A gated MLP with frozen, packed weights and LoRAs on any of its projections, as one function with its gradient.

    gate = (G + s A₁B₁) x      up = (U + s A₂B₂) x      out = (D + s A₃B₃) silu(gate) up

Run as separate modules, a LoRA alone writes three results as large as the projection's, and autograd keeps the gate, its
SiLU, ``up`` and their product. Here x, gate and up are kept, and low-rank terms are added in place. The gradient in x needs
no activation of a frozen projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alignpro.models.cpu.decoder_lora import AdaptedProjection, UnsupportedError, base_of
from alignpro.models.cpu.packed_linear import PackedLinear, input_gradient
from alignpro_kernels.decoder import ProjectionLoRA
from alignpro_kernels.layers import gate, gate_gradients
from alignpro_kernels.linear import packed_linear


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer without bias, W (N, K), and a LoRA on it."""

    weight: Tensor
    """W"""
    layer: PackedLinear
    """Holds it, and its panels."""
    lora: ProjectionLoRA | None

    @classmethod
    def of(cls, module: nn.Module) -> Projection | None:
        """Return a module's projection with its current weights; None if it is not of this kind in the pass that begins."""
        base = base_of(module)
        if type(base) is not PackedLinear or base.bias is not None:
            return None
        loras: list[ProjectionLoRA] = []
        if base is not module:
            try:
                found = AdaptedProjection(0, 0, module).loras()
            except UnsupportedError:
                return None
            if any(isinstance(rows, Tensor) for _, rows in found):
                return None
            loras = [lora for lora, rows in found if rows is True]
        if len(loras) > 1 or (torch.is_grad_enabled() and base.weight.requires_grad):
            return None
        return cls(base.weight, base, loras[0] if loras else None)

    @property
    def panels(self) -> Tensor:
        """W as `pack_weight` returns it."""
        return self.layer.packed_weights.panels(self.layer).weight

    def __call__(self, x: Tensor) -> Tensor:
        """Compute W x of rows (..., K), without gradient and without the LoRA, (..., N)."""
        return packed_linear(x, self.panels, len(self.weight))

    def factors(self) -> tuple[Tensor | None, Tensor | None]:
        """A (r, K) and B (N, r) of the LoRA."""
        return (None, None) if self.lora is None else (self.lora.a, self.lora.b)


def adapted_mlp(x: Tensor, gate: Projection, up: Projection, down: Projection) -> Tensor:
    """Compute down(silu(gate(x)) · up(x)), differentiable in x and in the LoRAs' factors.

    Args:
        x: (..., D) float32, on the CPU, not empty.
        gate: From D to I features.
        up: Likewise.
        down: From I to D features.

    Returns:
        (..., D) float32.
    """
    rows = x.flatten(0, -2)
    out: Tensor = _AdaptedMLP.apply(rows, (gate, up, down), *gate.factors(), *up.factors(), *down.factors())
    return out.view(x.shape)


class _AdaptedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, projections: tuple[Projection, ...], *factors: Tensor | None) -> Tensor:
        of_gate, of_up, of_down = projections
        g, low_gate = _product(x, of_gate)  # (T, I), (T, r)
        u, low_up = _product(x, of_up)
        out, low_down = _product(gate(g, u), of_down)  # (T, D)
        ctx.scales = [each.lora.scale if each.lora is not None else 0.0 for each in projections]
        weights = [each.weight for each in projections]
        ctx.save_for_backward(x, g, u, low_gate, low_up, low_down, *weights, *factors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, g, u, low_gate, low_up, low_down, *rest = ctx.saved_tensors
        weights, factors = rest[:3], rest[3:]
        pairs = list(zip(factors[::2], factors[1::2], strict=True))
        d_low: list[Tensor | None] = [None] * 3
        d_inner, d_low[2] = _input_gradient(gradient, weights[2], *pairs[2], ctx.scales[2])
        d_gate, d_up, inner = gate_gradients(g, u, d_inner)
        del d_inner
        d_x, d_low[0] = _input_gradient(d_gate, weights[0], *pairs[0], ctx.scales[0])
        more, d_low[1] = _input_gradient(d_up, weights[1], *pairs[1], ctx.scales[1])
        d_x += more
        of_factors: list[Tensor | None] = []
        products = ((x, low_gate, d_gate), (x, low_up, d_up), (inner, low_down, gradient))
        for (inputs, low, outputs), d, scale in zip(products, d_low, ctx.scales, strict=True):
            of_factors += (None, None) if d is None else (d.T @ inputs, scale * (outputs.T @ low))
        return d_x, None, *of_factors


def _product(x: Tensor, projection: Projection) -> tuple[Tensor, Tensor | None]:
    """Return (W + scale · B A) x of rows x (T, K), (T, N), and A x, (T, r)."""
    out = projection(x)
    if projection.lora is None:
        return out, None
    low = x @ projection.lora.a.T
    return out.addmm_(low, projection.lora.b.T, alpha=projection.lora.scale), low


def _input_gradient(
    gradient: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient in the inputs, (T, K), from that in the outputs, (T, N), and that in A x, (T, r)."""
    d_x = input_gradient(gradient, weight)
    if a is None or b is None:
        return d_x, None
    d_low = (gradient @ b).mul_(scale)
    return d_x.addmm_(d_low, a), d_low
