"""The output layer of a language model: hidden states → logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from alignpro_kernels import LoRA


@dataclass(frozen=True)
class Head:
    """The output layer: logits = softcap((weight + lora.scale · lora.b · lora.a) · hidden + bias)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None
    lora: LoRA | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the operators of `alignpro_kernels`, other than the weight."""
        return {"bias": self.bias, "softcap": self.softcap, "lora": self.lora}

    @property
    def merged(self) -> Tensor:
        """The weight with the LoRA merged into it, (V, D)."""
        if self.lora is None:
            return self.weight
        return self.weight + self.lora.scale * (self.lora.b @ self.lora.a)

    def shares_storage_with(self, other: Head) -> bool:
        """Whether both heads, apart from a LoRA, read the same storage, so that a fused kernel may load the weight once."""
        return (
            self.weight.data_ptr() == other.weight.data_ptr()
            and (self.bias is None) == (other.bias is None)
            and (self.bias is None or other.bias is None or self.bias.data_ptr() == other.bias.data_ptr())
            and self.softcap == other.softcap
        )
