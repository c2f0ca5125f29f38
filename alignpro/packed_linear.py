"""Linear layers on a CPU whose products are oneDNN's, without gradients by weights in a layout of its own.

PyTorch multiplies float32 matrices on a CPU by its BLAS, which reads a weight as it is stored. oneDNN, which PyTorch
carries too, is faster by up to a fifth (MKL 2024.2 and oneDNN 3.12 on a Zen 4 processor); and with a weight in blocks
that it chooses, 1.1 to 1.7 times as fast on 1 to 256 rows. Generation multiplies by the same weights token after token,
so they are laid out once, and again when they have changed. That takes as much memory again as the weights.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

logger = logging.getLogger(__name__)

LARGEST = 1 << 30
"""Bytes of weights up to which a model's are laid out a second time."""
_NARROWEST = 64
"""Outputs and inputs from which on it pays; the products of a LoRA are narrower."""
_ROWS = 256  # which the layout is chosen for; it is the same, or nearly, for other numbers


class Packing:
    """The second layout of the weights of a model's linear layers."""

    def __init__(self) -> None:
        self._weights: dict[nn.Linear, tuple[tuple[int, int], Tensor]] = {}

    def forget(self) -> None:
        """The weights have changed: give the memory of their layouts back."""
        # In-place changes are seen without it; those of a partitioned weight, made anew in the same memory, are not.
        self._weights.clear()

    def of(self, layer: nn.Linear) -> Tensor:
        """The weight of a layer as it is now."""
        weight = layer.weight
        state = weight.data_ptr(), weight._version
        known = self._weights.get(layer)
        if known is None or known[0] != state:
            known = state, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
            self._weights[layer] = known
        return known[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Packing:
        """Empty: a copied model has weights of its own."""
        return Packing()


class PackedLinear(nn.Linear):
    """A linear layer that multiplies by oneDNN, and takes its weight from a `Packing` where no gradient is wanted."""

    packing: Packing

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        if input.dtype != torch.float32 or self.weight.device.type != "cpu" or not input.numel():
            return super().forward(input)
        if torch.is_grad_enabled():
            out: Tensor = _Product.apply(input, self.weight)
            return out if self.bias is None else out + self.bias
        return _product(input, self.packing.of(self), self.bias)


class _Product(torch.autograd.Function):
    """x Wᵀ; the gradient of W, which sums over rows, is left to the BLAS, which is the faster at that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        d_x = _product(gradient, weight.T) if ctx.needs_input_grad[0] else None
        return d_x, None if x is None else gradient.flatten(0, -2).T @ x.flatten(0, -2)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return out


def attach(model: nn.Module) -> Packing | None:
    """Let the linear layers of a float32 model on a CPU have a second layout; None where it would be too large."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and _is_plain(module)]
    weights = [layer.weight for layer in layers]
    # PyTorch's compiler calls these operators; they are not part of its documented interface.
    known = {"mkldnn::_linear_pointwise", "mkldnn::_reorder_linear_weight"} <= set(
        torch._C._dispatch_get_all_op_names()
    )
    suited = (
        torch.backends.mkldnn.is_available()
        and known
        and all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)
    )
    if not suited:
        return None
    if (size := sum(weight.nbytes for weight in weights)) > LARGEST:
        logger.info("linear layers run on PyTorch's BLAS: %d MiB are too many to lay out again for oneDNN", size >> 20)
        return None
    packing = Packing()
    for layer in layers:
        # A subclass put in place, as parametrizations of PyTorch do: whoever holds the layer goes on holding it.
        layer.__class__ = PackedLinear
        layer.packing = packing  # type: ignore[assignment]
    return packing


def detach(model: nn.Module) -> None:
    """Undo `attach`, for a model whose weights are not there between its passes: they would be laid out anew for each."""
    for layer in model.modules():
        if type(layer) is PackedLinear:
            layer.__class__ = nn.Linear  # type: ignore[assignment]
            del layer.packing


def _is_plain(layer: nn.Linear) -> bool:
    """Whether nobody else has changed how it multiplies, and it is wide enough."""
    return type(layer) in (nn.Linear, PackedLinear) and min(layer.weight.shape) >= _NARROWEST
