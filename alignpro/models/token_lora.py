"""A LoRA that acts on a subset of the tokens of a forward pass: an activated LoRA, or a LoRA that runs with its base model.

An activated LoRA (Greenewald et al., 2025, "Activated LoRA") acts from the last occurrence of its invocation tokens in the
prompt onwards. The base model computes the tokens before it, so their keys and values equal the base model's, bit for bit.

peft locates the invocation in each batch row. Here the tokens of many sequences are packed into one row, so the active
tokens are listed explicitly, through peft's extension point for LoRA variants (`LoraVariant`). peft's own forward pass and
its saved files are unchanged.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.lora import Linear
from peft.tuners.lora.variants import ALoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from alignpro.models.invocation import ActiveTokens, invocation_tokens


class TokenLora(ALoraLinearVariant):
    """Adds a layer's LoRA output to the rows of the active tokens; the other rows are unchanged and cost nothing.

    Args:
        active: The active tokens.
        activated: Whether peft's own forward pass is that of an activated LoRA, rather than a plain one.
    """

    def __init__(self, active: ActiveTokens, *, activated: bool) -> None:
        self.active = active
        self.activated = activated

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Add the LoRA's output to ``result``: (B, T, out) from x, (B, T, in); B is 1 if rows are given."""
        variant = module.lora_variant[active_adapter]
        assert isinstance(variant, TokenLora)
        rows = variant.active.rows
        if rows is None and variant.activated:
            return ALoraLinearVariant.forward(module, active_adapter, x, result, **kwargs)
        if rows is False or (isinstance(rows, Tensor) and not len(rows)):
            return result
        if isinstance(rows, Tensor):
            x = x.index_select(1, rows)
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x = module.lora_dropout[active_adapter](x.to(down.weight.dtype))
        delta: Tensor = up(down(x)) * module.scaling[active_adapter]
        if isinstance(rows, Tensor):
            # Converting to a wider dtype and back leaves the other rows unchanged, bit for bit.
            return result.to(delta.dtype, copy=True).index_add_(1, rows, delta).to(result.dtype)
        return result + delta


def install_token_lora(model: PeftModel) -> ActiveTokens:
    """Make the model's LoRA act on the tokens that are set in the returned object.

    Raises:
        ValueError: The adapter is not a LoRA, or has parts that cannot be restricted to a subset of the tokens.
    """
    config, name = model.active_peft_config, model.active_adapter
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    lora = [layer for layer in layers if isinstance(layer, Linear) and layer.active_adapters == [name]]
    variants = [layer.lora_variant.get(name) for layer in lora]
    if installed := [variant for variant in variants if isinstance(variant, TokenLora)]:
        return installed[0].active
    only_lora = len(lora) == len(layers) and all(isinstance(each, ALoraLinearVariant | None) for each in variants)
    if not lora or not only_lora or config.bias != "none":
        raise ValueError(
            f"its adapter ({config.peft_type.value}) cannot be restricted to a subset of the tokens: this requires a single "
            "LoRA on linear layers, without trained biases or other trained modules, and not a variant such as DoRA"
        )
    active = ActiveTokens()
    for layer in lora:
        layer.lora_variant[name] = TokenLora(active, activated=bool(invocation_tokens(model)))
    return active
