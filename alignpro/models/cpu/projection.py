"""A linear layer with packed weights and, where peft has added one, a LoRA: y = x Wᵀ + s (x Aᵀ) Bᵀ, and its gradients.

Written out, the LoRA is added in the product's own memory, and what a backward pass needs is x and x Aᵀ alone. Composed of
separate operations, its output is written, scaled and added, each time in fresh memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from alignpro.models.cpu.decoder_lora import AdaptedProjection, UnsupportedError, base_of
from alignpro.models.cpu.packed_linear import PackedLinear
from alignpro_kernels.linear import pack_weight, packed_linear


@dataclass(frozen=True)
class Projection:
    """The weights of such a layer in a pass."""

    weight: Tensor
    """W, (N, K) float32 or bfloat16."""
    panels: Tensor
    """W, as `pack_weight` returns it."""
    a: Tensor | None = None
    """A, (r, K) float32, or None without a LoRA."""
    b: Tensor | None = None
    """B, (N, r) float32, likewise."""
    scale: float = 1.0
    """s."""

    @classmethod
    def of(cls, layer: nn.Module) -> Projection | None:
        """The current weights of a layer; None if it computes something else, not for all tokens alike, or calls a hook."""
        base = base_of(layer)
        if type(base) is not PackedLinear or base.bias is not None:
            return None
        if any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules()):
            return None
        plain = cls(base.weight, base.packed_weights.panels(base).weight)
        try:
            loras = [] if base is layer else AdaptedProjection(0, 0, layer).loras()
        except UnsupportedError:
            return None
        active = [(lora, rows) for lora, rows in loras if rows is not False]
        if not active:
            return plain
        (lora, rows), *others = active
        return None if others or rows is not True else cls(plain.weight, plain.panels, lora.a, lora.b, lora.scale)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute y, (T, N), and x Aᵀ, (T, r), from x, (T, K), without a graph."""
        out = packed_linear(x, self.panels, len(self.weight))
        if self.a is None or self.b is None:
            return out, None
        low = x @ self.a.T
        return out.addmm_(low, self.b.T, alpha=self.scale), low

    def gradients(
        self, gradient: Tensor, x: Tensor, low: Tensor | None, *, trained: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Compute the gradients of x, of W if it is ``trained``, of A and of B.

        Args:
            gradient: That of y, (T, N).
            x: (T, K).
            low: x Aᵀ, (T, r).
            trained: Whether W is.
        """
        # Packing W for a single product is cheap: the rows of W are nearly panels of Wᵀ already.
        of_x = packed_linear(gradient, pack_weight(self.weight.T), self.weight.shape[1])
        of_weight = gradient.T @ x if trained else None
        if self.a is None or self.b is None or low is None:
            return of_x, of_weight, None, None
        of_low = (gradient @ self.b).mul_(self.scale)  # (T, r)
        of_x.addmm_(of_low, self.a)
        return of_x, of_weight, of_low.T @ x, (gradient.T @ low).mul_(self.scale)
