"""Norms and gated layers of a model on a CPU, each in fewer passes over memory, for passes without gradients.

A transformers model computes a root mean square norm in six operations, each of which writes its result out, and the
product of a gated layer in two more. For a few rows that is the time to begin them, for many that of fresh memory. What
computes the same (which is tried, not assumed) is given a subclass that does it in one, of csrc/cpu: gates within the
products. A model with layers of another kind keeps them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from alignpro.packed_linear import PackedLinear, Packing
from alignpro_kernels.linear import packed_gate


class FusedNorm(nn.Module):
    """A norm x / √(mean(x²) + ε) · (weight + offset)."""

    weight: nn.Parameter
    fused_eps: float
    fused_offset: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) → (..., D)."""
        if torch.is_grad_enabled() or not _suited(hidden_states):
            plain: Tensor = super().forward(hidden_states)
            return plain
        out: Tensor = torch.ops.alignpro.rms_norm.default(hidden_states, self.weight, self.fused_eps, self.fused_offset)
        return out


class _FusedGate(nn.Module):
    """A layer down(silu(gate(x)) · up(x))."""

    gate_proj: PackedLinear
    up_proj: PackedLinear
    down_proj: PackedLinear

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D)."""
        layers = self.gate_proj, self.up_proj
        # An adapter may have been put around them since.
        if torch.is_grad_enabled() or not _suited(x) or any(type(layer) is not PackedLinear for layer in layers):
            plain: Tensor = super().forward(x)
            return plain
        gate, up = (layer.packing.panels(layer).weight for layer in layers)
        inner = packed_gate(x, gate, up, self.up_proj.out_features)
        out: Tensor = self.down_proj(inner)
        return out


def attach(model: nn.Module, packing: Packing | None) -> None:
    """Give a model's layers the faster forms, where its linear layers have theirs and csrc/cpu is there."""
    if packing is None:
        return
    for module in list(model.modules()):
        if _is_gated(module):
            become(module, _FusedGate)
        elif type(module).__name__.endswith("RMSNorm"):
            _try_norm(module)


def _suited(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0


@torch.no_grad()
def _try_norm(module: nn.Module) -> None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not isinstance(eps, float):
        return
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return
    scales = torch.tensor([[1.0], [30.0], [eps**0.5]])
    x = scales * torch.linspace(-2, 3, len(weight)).sin()  # (3, D), one row as small as ε makes a difference
    expected = module(x)
    for offset in (0.0, 1.0):  # Gemma's weights are what is added to 1
        if torch.allclose(torch.ops.alignpro.rms_norm.default(x, weight, eps, offset), expected, rtol=1e-5, atol=1e-6):
            become(module, FusedNorm)
            assert isinstance(module, FusedNorm)
            module.fused_eps, module.fused_offset = eps, offset
            return


def _is_gated(module: nn.Module) -> bool:
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(type(layer) is PackedLinear and layer.bias is None for layer in layers):
        return False
    gate, up, down = layers
    assert isinstance(gate, PackedLinear) and isinstance(up, PackedLinear) and isinstance(down, PackedLinear)
    x = torch.linspace(-3, 3, 2 * gate.in_features).sin().view(2, -1)
    with torch.no_grad():
        expected = down(nn.functional.silu(gate(x)) * up(x))
        return torch.allclose(module(x), expected, rtol=1e-5, atol=1e-6)


def become(module: nn.Module, form: Any) -> None:
    """Give a module the methods of ``form``, before those of its own class."""
    plain: Any = type(module)
    module.__class__ = _combined(form, plain)


@functools.cache
def _combined(form: Any, plain: Any) -> type[Any]:
    """A subclass of both, so that whoever asks what the layer is gets the answer that it had before."""
    if issubclass(plain, form):
        return plain
    return type(f"{form.__name__.lstrip('_')}{plain.__name__}", (form, plain), {"__module__": __name__})
