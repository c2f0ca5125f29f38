"""A gated MLP, down(silu(gate(x)) · up(x)), with gradients: what is kept for the backward pass is x, gate(x) and up(x).

Composed of separate operations, silu(gate(x)) and the product are kept as well, each as wide as the MLP; they are recomputed
here. The gradient of each layer's input is one product, and no gradient of a frozen weight is computed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from alignpro.models.cpu.projection import Projection
from alignpro_kernels.autograd import differentiable_once


def gated_mlp(x: Tensor, gate: Projection, up: Projection, down: Projection) -> Tensor:
    """Compute down(silu(gate(x)) · up(x)), differentiable.

    Args:
        x: (..., D) float32, on the CPU.
        gate: D → I.
        up: D → I.
        down: I → D.

    Returns:
        (..., D) float32.
    """
    weights = [w for each in (gate, up, down) for w in (each.weight, each.a, each.b)]
    out: Tensor = _GatedMLP.apply(x, (gate, up, down), *weights)
    return out


class _GatedMLP(torch.autograd.Function):
    """``weights`` are those of the projections. Autograd keeps them, so it notices a change before the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: tuple[Projection, ...], *weights: Tensor | None) -> Tensor:
        gate, up, down = layers
        rows = x.flatten(0, -2)  # (T, D)
        gated, low_gate = gate(rows)  # (T, I), (T, r)
        wide, low_up = up(rows)
        out, low_down = down(silu(gated).mul_(wide))
        ctx.layers = layers
        ctx.save_for_backward(rows, gated, wide, low_gate, low_up, low_down, *weights)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @differentiable_once("a model whose layers are not packed")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gated, wide, low_gate, low_up, low_down, *weights = ctx.saved_tensors
        gate, up, down = (
            replace(layer, weight=weight, a=a, b=b)
            for layer, weight, a, b in zip(ctx.layers, weights[::3], weights[1::3], weights[2::3], strict=True)
        )
        trained = ctx.needs_input_grad[2::3]  # W of each layer
        activated = silu(gated)  # (T, I)
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_inner, *of_down = down.gradients(rows, activated * wide, low_down, trained=trained[2])
        of_x, *of_up = up.gradients(activated.mul_(of_inner), x, low_up, trained=trained[1])
        of_gated = torch.ops.aten.silu_backward(of_inner.mul_(wide), gated)
        of_x_by_gate, *of_gate = gate.gradients(of_gated, x, low_gate, trained=trained[0])
        return of_x.add_(of_x_by_gate).view(*gradient.shape[:-1], -1), None, *of_gate, *of_up, *of_down
