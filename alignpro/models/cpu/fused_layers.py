"""Fused RMS norms and gated MLPs of a model on a CPU.

A transformers model computes an RMS norm in six operations, each of which writes its result to memory, and the gating of
an MLP in two more. For a few rows the cost is the launch of these operations, for many rows it is writing to fresh
memory. A module that computes the same function (this is tested, not assumed) gets a subclass that does it in one
operator of csrc/cpu; gating is fused into the matrix products. In passes with gradients, an MLP keeps less for the backward
pass (`gated_mlp`). Layers of another kind are left as they are.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from alignpro.models.cpu.decoder_lora import base_of, everywhere
from alignpro.models.cpu.gated_mlp import gated_mlp
from alignpro.models.cpu.packed_linear import PackedLinear
from alignpro.models.cpu.projection import Projection
from alignpro_kernels.linear import WEIGHTS, packed_gate


class FusedRMSNorm(nn.Module):
    """A norm x / √(mean(x²) + ε) · (weight + offset)."""

    weight: nn.Parameter
    fused_eps: float
    fused_offset: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) → (..., D)."""
        if torch.is_grad_enabled() or not _is_supported(hidden_states):
            plain: Tensor = super().forward(hidden_states)
            return plain
        weight = self.weight.float()  # the weight itself, unless it is bfloat16
        out: Tensor = torch.ops.alignpro.rms_norm.default(hidden_states, weight, self.fused_eps, self.fused_offset)
        return out


class _FusedGatedMLP(nn.Module):
    """A gated MLP, down(silu(gate(x)) · up(x))."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D)."""
        # An adapter may have wrapped them since.
        gate, up, down = map(Projection.of, (self.gate_proj, self.up_proj, self.down_proj))
        if gate is None or up is None or down is None or not _is_supported(x):
            plain: Tensor = super().forward(x)
            return plain
        if torch.is_grad_enabled():
            return gated_mlp(x, gate, up, down)
        rows = x.flatten(0, -2)  # (T, D)
        if gate.a is None and up.a is None:
            inner = packed_gate(rows, gate.panels, up.panels, len(up.weight))  # (T, I)
        else:
            inner = nn.functional.silu(gate(rows)[0]).mul_(up(rows)[0])
        return down(inner)[0].view(*x.shape[:-1], -1)


def fuse_layers(model: nn.Module) -> None:
    """Fuse the norms and gated MLPs of a model whose linear layers are packed."""
    for module in list(model.modules()):
        if _is_gated_mlp(module):  # also one that an adapter has wrapped, as in a saved prompter
            mix_in(module, _FusedGatedMLP)
        elif type(module).__name__.endswith("RMSNorm"):
            fuse_norm(module)


def _is_supported(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0


@torch.no_grad()
def fuse_norm(module: nn.Module) -> None:
    """Fuse an RMS norm, if the operator computes what the module computes of float32 states."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not isinstance(eps, float):
        return
    if weight.dtype not in WEIGHTS or weight.device.type != "cpu":
        return
    scales = torch.tensor([[1.0], [30.0], [eps**0.5]], dtype=torch.float32)
    x = (
        scales * torch.linspace(-2, 3, len(weight), dtype=torch.float32).sin()
    )  # (3, D); one row is so small that ε matters
    expected = module(x)
    if expected.dtype != torch.float32:
        return
    for offset in (0.0, 1.0):  # Gemma stores weight − 1
        found = torch.ops.alignpro.rms_norm.default(x, weight.float(), eps, offset)
        if torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
            mix_in(module, FusedRMSNorm)
            assert isinstance(module, FusedRMSNorm)
            module.fused_eps, module.fused_offset = eps, offset
            return


def _is_gated_mlp(module: nn.Module) -> bool:
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    bases = [base_of(layer) for layer in layers]
    if not all(type(base) is PackedLinear and base.bias is None for base in bases):
        return False
    assert isinstance(bases[0], PackedLinear)
    gate, up, down = (layer for layer in layers if isinstance(layer, nn.Module))
    x = torch.linspace(-3, 3, 2 * bases[0].in_features, dtype=torch.float32).sin().view(1, 2, -1)
    with torch.no_grad(), everywhere(module):
        expected = down(nn.functional.silu(gate(x)) * up(x))
        return torch.allclose(module(x), expected, rtol=1e-5, atol=1e-6)


def mix_in(module: nn.Module, mixin: Any) -> None:
    """Make a module an instance of ``mixin`` as well, whose methods override those of its own class."""
    original: Any = type(module)
    module.__class__ = _mixed_class(mixin, original)


@functools.cache
def _mixed_class(mixin: Any, original: Any) -> type[Any]:
    """Return a subclass of both, so that ``isinstance`` checks for the module's own class still hold."""
    if issubclass(original, mixin):
        return original
    return type(f"{mixin.__name__.lstrip('_')}{original.__name__}", (mixin, original), {"__module__": __name__})
