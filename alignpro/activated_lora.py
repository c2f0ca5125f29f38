"""A LoRA that acts on some of the tokens of a forward pass: an activated LoRA, or one beside its base model.

An activated LoRA (Greenewald et al., 2025, "Activated LoRA") acts from the last occurrence of its invocation tokens in the
prompt on. What stands before is computed by the base model, so its keys and values are the base model's, bit for bit.

peft finds the place for each row of a batch. Here tokens of many sequences lie on one line, so each token is told by
itself, through peft's own place for kinds of LoRA (`LoraVariant`); peft's forward pass, and what it saves, stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from peft import PeftModel
from peft.tuners.lora import Linear
from peft.tuners.lora.variants import ALoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from alignpro.errors import DataError


class ActiveTokens:
    """The tokens that a LoRA acts on while a forward pass lasts; all layers of a model look here."""

    def __init__(self) -> None:
        self.rows: Tensor | bool | None = None
        """(A,) int64, places on the line, all different; True for all tokens, False for none; None leaves it to peft."""

    @contextmanager
    def set(self, rows: Tensor | bool) -> Iterator[None]:
        """Let the LoRA act on these tokens."""
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before

    def again(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `torch.utils.checkpoint`: a pass that is made again in the backward pass has the tokens of the first one."""
        return nullcontext(), nullcontext() if self.rows is None else self.set(self.rows)


class TokenLora(ALoraLinearVariant):
    """How a layer adds its LoRA: to the rows of the active tokens; the others are not touched, and cost nothing.

    Args:
        active: Says which those are.
        activated: Whether peft's own forward pass is that of an activated LoRA, and not of a plain one.
    """

    def __init__(self, active: ActiveTokens, *, activated: bool) -> None:
        self.active = active
        self.activated = activated

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """``result`` with the LoRA's part added: (B, T, out) from x, (B, T, in); B is 1 where rows are given."""
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
            # There and back from a wider type leaves the other rows as they are, bit for bit.
            return result.to(delta.dtype, copy=True).index_add_(1, rows, delta).to(result.dtype)
        return result + delta


def invocation_tokens(model: PeftModel) -> tuple[int, ...]:
    """The tokens from which on a model's adapter acts; none if it is not an activated LoRA."""
    return tuple(getattr(model.active_peft_config, "alora_invocation_tokens", None) or ())


def take_over(model: PeftModel) -> ActiveTokens:
    """Let the model's LoRA act on the tokens that the result says.

    Raises:
        ValueError: Its adapter is another one, or has parts that cannot act on some tokens only.
    """
    config, name = model.active_peft_config, model.active_adapter
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    lora = [layer for layer in layers if isinstance(layer, Linear) and layer.active_adapters == [name]]
    variants = [layer.lora_variant.get(name) for layer in lora]
    if taken := [variant for variant in variants if isinstance(variant, TokenLora)]:
        return taken[0].active
    alone = len(lora) == len(layers) and all(isinstance(each, ALoraLinearVariant | None) for each in variants)
    if not lora or not alone or config.bias != "none":
        raise ValueError(
            f"its adapter ({config.peft_type.value}) cannot act on some tokens only: that takes one LoRA on linear layers, "
            "which is all that is trained and of no other kind, such as DoRA"
        )
    active = ActiveTokens()
    for layer in lora:
        layer.lora_variant[name] = TokenLora(active, activated=bool(invocation_tokens(model)))
    return active


def invoked_at(prompt: Sequence[int], invocation: Sequence[int]) -> int:
    """The place of the first token that an activated LoRA acts on: where its invocation tokens occur last, as in peft.

    Raises:
        DataError: They do not occur in the prompt.
    """
    wanted = tuple(invocation)
    for start in range(len(prompt) - len(wanted), -1, -1):
        if tuple(prompt[start : start + len(wanted)]) == wanted:
            return start
    raise DataError(
        f"the prompt has no invocation tokens {list(wanted)}, from which on the activated LoRA acts: is it put to the "
        "model with the chat template that the adapter was made with?"
    )
