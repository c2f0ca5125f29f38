"""Linear layers on a CPU whose weights are laid out in panels, as `alignpro_kernels.linear` multiplies by them.

PyTorch multiplies float32 matrices on a CPU by its BLAS, which reads a weight as it is stored and is made for many rows. Of
a weight in panels few rows are multiplied faster and many about as fast (docs/kernels.md). Generation multiplies by the same
weights token after token, so they are laid out once, and again when they have changed. That takes as much memory again as
the weights.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alignpro_kernels import cpp_library, linear
from alignpro_kernels.linear import PANEL, pack_weight, packed_linear

logger = logging.getLogger(__name__)

LARGEST = 1 << 30
"""Bytes of weights up to which a model's are laid out a second time."""
_PACKING = "weight_packing"
"""The attribute of a model that holds its `Packing`."""
_NARROWEST = 64
"""Outputs and inputs from which on it pays; the products of a LoRA are narrower."""


@dataclass(frozen=True, eq=False)
class Panels:
    """What `alignpro_kernels.linear` takes of one or several linear layers."""

    weight: Tensor
    """By `pack_weight`."""
    bias: Tensor | None
    """(N,)"""


class Packing:
    """The second layout of the weights of a model's linear layers."""

    def __init__(self) -> None:
        self._panels: dict[tuple[nn.Linear, ...], tuple[tuple[int, ...], Panels]] = {}
        self.derived: dict[object, Any] = {}
        """What others have made of panels; forgotten with them."""

    def forget(self) -> None:
        """The weights have changed: give the memory of their layouts back."""
        # In-place changes are seen without it; those of a partitioned weight, made anew in the same memory, are not.
        self._panels.clear()
        self.derived.clear()

    def panels(self, *layers: nn.Linear) -> Panels:
        """The weights of layers with the same inputs as they are now, behind one another; a new object when they change."""
        known, state = self._panels.get(layers), _state(layers)
        if known is None or known[0] != state:
            weights = [layer.weight.detach() for layer in layers]
            biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
            whole = pack_weight(weights[0] if len(weights) == 1 else torch.cat(weights))
            known = state, Panels(whole, torch.cat(biases) if biases else None)
            self._panels[layers] = known
            if len(layers) > 1 and all(layer.out_features % PANEL == 0 for layer in layers):
                parts = whole.split([layer.out_features // PANEL for layer in layers])
                for layer, part in zip(layers, parts, strict=True):  # held once
                    self._panels[layer,] = _state((layer,)), Panels(part, layer.bias)
        return known[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Packing:
        """Empty: a copied model has weights of its own."""
        return Packing()


class PackedLinear(nn.Linear):
    """A linear layer that takes its weight from a `Packing`."""

    packing: Packing

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        if input.dtype != torch.float32 or self.weight.device.type != "cpu" or not input.numel():
            return super().forward(input)
        panels = self.packing.panels(self)
        if not torch.is_grad_enabled():
            return packed_linear(input, panels.weight, self.out_features, panels.bias)
        out: Tensor = _Product.apply(input, self.weight, panels.weight)
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    """x Wᵀ; the gradient of W, which sums over rows, is left to the BLAS, which is the faster at that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, panels: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return packed_linear(x, panels, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        # Packed for one product: its rows are panels nearly as they are.
        d_x = packed_linear(gradient, pack_weight(weight.T), weight.shape[1]) if ctx.needs_input_grad[0] else None
        return d_x, None if x is None else gradient.flatten(0, -2).T @ x.flatten(0, -2), None


def attach(model: nn.Module) -> Packing | None:
    """Let the linear layers of a float32 model on a CPU have a second layout; None where they cannot or should not.

    A model has one `Packing`, however often it is attached: whoever tells of changed weights tells all who read them.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and _is_plain(module)]
    weights = [layer.weight for layer in layers]
    if not all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights):
        return None
    if (reason := _unsuited(sum(weight.nbytes for weight in weights))) is not None:
        logger.info("linear layers run on PyTorch's BLAS: %s", reason)
        return None
    packing = getattr(model, _PACKING, None)
    if packing is None:
        packing = Packing()
        setattr(model, _PACKING, packing)
    assert isinstance(packing, Packing)
    packing.forget()  # a merged adapter changes weights past what PyTorch counts
    for layer in layers:
        # A subclass put in place, as parametrizations of PyTorch do: whoever holds the layer goes on holding it.
        layer.__class__ = PackedLinear
        layer.packing = packing  # type: ignore[assignment]
    return packing


def detach(model: nn.Module) -> None:
    """Undo `attach`, for a model whose weights are not there between its passes: they would be laid out anew for each."""
    for layer in model.modules():
        layer.__dict__.pop(_PACKING, None)
        if type(layer) is PackedLinear:
            layer.__class__ = nn.Linear  # type: ignore[assignment]
            del layer.packing


def _state(layers: tuple[nn.Linear, ...]) -> tuple[int, ...]:
    """By which a change of weights is seen."""
    return tuple(
        x for layer in layers for p in (layer.weight, layer.bias) if p is not None for x in (p.data_ptr(), p._version)
    )


def _unsuited(size: int) -> str | None:
    """Why weights of so many bytes are better not laid out again."""
    if size > LARGEST:
        return f"{size >> 20} MiB of weights are too many to lay out again"
    if (reason := linear.unavailable()) is not None:
        return reason
    if cpp_library.instructions() == "generic":
        return "the C++ operators are not written for this processor's instructions"
    return None


def _is_plain(layer: nn.Linear) -> bool:
    """Whether nobody else has changed how it multiplies, and it is wide enough."""
    return type(layer) in (nn.Linear, PackedLinear) and min(layer.weight.shape) >= _NARROWEST
