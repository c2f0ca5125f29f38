"""Linear layers on a CPU whose weights are packed into panels for the products of `alignpro_kernels.linear`.

PyTorch multiplies float32 matrices on a CPU with its BLAS, which reads a weight in its stored layout and is optimised for
many rows. With a weight in panels, products with few rows are faster and those with many about as fast (docs/kernels.md).
Generation multiplies by the same weights at every token, so they are packed once, and again after they have changed. The
packed copy takes as much memory as the weights, which may be bfloat16 (`wide_states`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignpro_kernels import cpp_library
from alignpro_kernels.autograd import differentiable_once
from alignpro_kernels.linear import PANEL, WEIGHTS, pack_weight, packed_linear

logger = logging.getLogger(__name__)

MAX_PACKED_BYTES = {torch.float32: 1 << 30, torch.bfloat16: 4 << 30}
"""Models whose linear weights have more bytes than this are not packed. In bfloat16, weights and their copy take the memory of
float32 weights, and not to pack costs more time."""
_ATTRIBUTE = "packed_weights"
"""The attribute of a model that holds its `PackedWeights`."""
_MIN_FEATURES = 64
"""Smallest number of inputs and outputs for which packing pays off; the products of a LoRA are narrower."""


@dataclass(frozen=True, eq=False)
class Panels:
    """Packed weight and bias of one or several linear layers, as `alignpro_kernels.linear` takes them."""

    weight: Tensor
    """As `pack_weight` returns it."""
    bias: Tensor | None
    """(N,) float32"""


class PackedWeights:
    """Cache of the packed weights of a model's linear layers."""

    def __init__(self) -> None:
        self._panels: dict[tuple[nn.Linear, ...], tuple[tuple[int, ...], Panels]] = {}
        self._lender: PackedWeights | None = None
        self._twins: dict[nn.Linear, nn.Linear] = {}
        self.derived: dict[object, Any] = {}
        """Objects that other modules have derived from panels; discarded with them."""

    def borrow(self, lender: PackedWeights, twins: dict[nn.Linear, nn.Linear]) -> None:
        """Take panels from another model's cache, so that layers whose weights are in the same memory are packed once.

        Args:
            lender: That cache. Its weights do not change, or it may come to hold other panels than this one.
            twins: Layer → the lender's; one whose weight is elsewhere by now is packed here.
        """
        self.invalidate()
        self._lender, self._twins = lender, twins

    def invalidate(self) -> None:
        """Discard the packed weights and free their memory, because the weights have changed."""
        # Changes that PyTorch counts, such as an optimizer's, are detected without this. It does not count those through
        # `weight.data`, nor of a partitioned weight that is rebuilt in the same memory.
        self._panels.clear()
        self.derived.clear()

    def panels(self, *layers: nn.Linear) -> Panels:
        """Return the current weights of layers with the same input, concatenated; a new object after they change."""
        cached, version = self._panels.get(layers), weights_version(layers)
        if cached is None or cached[0] != version:
            if (borrowed := self._borrowed(layers)) is not None:
                self._panels[layers] = version, borrowed
                return borrowed
            weights = [layer.weight.detach() for layer in layers]
            biases = [layer.bias.detach().float() for layer in layers if layer.bias is not None]
            packed = pack_weight(weights[0] if len(weights) == 1 else torch.cat(weights))
            cached = version, Panels(packed, torch.cat(biases) if biases else None)
            self._panels[layers] = cached
            if len(layers) > 1 and all(layer.out_features % PANEL == 0 for layer in layers):
                parts = packed.split([layer.out_features // PANEL for layer in layers])
                for layer, part in zip(layers, parts, strict=True):  # views of the same memory
                    bias = None if layer.bias is None else layer.bias.detach().float()
                    self._panels[layer,] = weights_version((layer,)), Panels(part, bias)
        return cached[1]

    def _borrowed(self, layers: tuple[nn.Linear, ...]) -> Panels | None:
        """The lender's panels of the same memory; None if there are none."""
        twins = tuple(self._twins[layer] for layer in layers if layer in self._twins)
        if self._lender is None or len(twins) < len(layers):
            return None
        addresses = ([x.data_ptr() for layer in each for x in layer.parameters()] for each in (layers, twins))
        return self._lender.panels(*twins) if next(addresses) == next(addresses) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeights:
        """Return an empty cache: a copied model has its own weights."""
        return PackedWeights()


class WideLinear(nn.Linear):
    """A linear layer in bfloat16 that takes and gives float32; its weight is widened in each pass."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features) in the dtype of ``input``."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight.to(input.dtype), bias)


class PackedLinear(nn.Linear):
    """A linear layer that multiplies by the packed weight of a `PackedWeights`."""

    packed_weights: PackedWeights

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        if input.dtype != torch.float32 or self.weight.dtype not in WEIGHTS or self.weight.device.type != "cpu":
            return super().forward(input)
        if not input.numel():
            return input @ self.weight.T.to(input.dtype)
        panels = self.packed_weights.panels(self)
        if not torch.is_grad_enabled():
            return packed_linear(input, panels.weight, self.out_features, panels.bias)
        out: Tensor = _Product.apply(input, self.weight, panels.weight)
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    """x Wᵀ with packed W. The gradient of W, which sums over rows, is left to the BLAS, which is faster at it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, panels: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return packed_linear(x, panels, len(weight))

    @staticmethod
    @differentiable_once("a model whose layers are not packed")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        # Packing it for a single product is cheap: the rows of W are nearly panels of Wᵀ already.
        d_x = packed_linear(gradient, pack_weight(weight.T), weight.shape[1]) if ctx.needs_input_grad[0] else None
        # Autograd rounds the gradient of a weight to its dtype.
        return d_x, None if x is None else gradient.flatten(0, -2).T @ x.flatten(0, -2), None


def pack_linear_layers(model: nn.Module) -> PackedWeights | None:
    """Pack the linear layers of a model on a CPU, in float32 or bfloat16; return None if they cannot or should not be packed.

    Those in bfloat16 are packed if they take float32 (`wide_states`).

    A model has one `PackedWeights`, however often it is packed, so that `PackedWeights.invalidate` reaches all users of its
    weights.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    narrow = any(type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16 for layer in linear)
    layers = [layer for layer in linear if _is_packable(layer)]
    if narrow or any(layer.weight.dtype not in WEIGHTS or layer.weight.device.type != "cpu" for layer in layers):
        return None
    if (reason := unpackable(model)) is not None:
        logger.info("linear layers run on PyTorch's BLAS: %s", reason)
        return None
    packed_weights = getattr(model, _ATTRIBUTE, None)
    if packed_weights is None:
        packed_weights = PackedWeights()
        setattr(model, _ATTRIBUTE, packed_weights)
    assert isinstance(packed_weights, PackedWeights)
    packed_weights.invalidate()  # merging an adapter changes weights without changing their version counters
    for layer in layers:
        # The class is changed in place, as PyTorch's parametrizations do, so that references to the layer stay valid.
        layer.__class__ = PackedLinear
        layer.packed_weights = packed_weights  # type: ignore[assignment]
    return packed_weights


def unpack_linear_layers(model: nn.Module) -> None:
    """Undo `pack_linear_layers`, for a model whose weights are gathered for each pass and would be packed anew each time."""
    for module in model.modules():
        module.__dict__.pop(_ATTRIBUTE, None)
        if type(module) is PackedLinear:
            narrow = module.weight.dtype == torch.bfloat16
            module.__class__ = WideLinear if narrow else nn.Linear  # type: ignore[assignment]


def weights_version(layers: Sequence[nn.Linear]) -> tuple[int, ...]:
    """Return addresses and version counters, which reveal a change of the weights."""
    # Read in every step of generation: a module's attributes would take five times as long as its dictionary.
    found = [x for layer in layers for x in layer._parameters.values() if x is not None]
    return tuple([x.data_ptr() for x in found] + [x._version for x in found])


def unpackable(model: nn.Module) -> str | None:
    """Return why the linear layers of a model cannot or should not be packed, or None if they should."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    for dtype, most in MAX_PACKED_BYTES.items():
        if (size := sum(weight.nbytes for weight in weights if weight.dtype == dtype)) > most:
            return f"{size >> 20} MiB of weights are too many to keep a second copy in panels"
    return no_kernels()


def no_kernels() -> str | None:
    """Return why packed products do not run on this processor, or None if they do."""
    if (reason := cpp_library.unavailable()) is not None:
        return reason
    if cpp_library.instructions() == "generic":
        return "the C++ operators have no version for this processor's vector instructions"
    return None


def _is_packable(layer: nn.Linear) -> bool:
    """Whether the layer is a plain linear layer, and packing possible and worth it."""
    if layer.weight.dtype == torch.bfloat16:
        even = (
            layer.in_features % 2 == layer.out_features % 2 == 0
        )  # also of its transpose, for the gradient of the input
        return type(layer) in (WideLinear, PackedLinear) and even
    return type(layer) in (nn.Linear, PackedLinear) and min(layer.weight.shape) >= _MIN_FEATURES
