"""Whether a model or a layer is one of peft: questions that do not import peft, which takes long.

Only what was made with peft can be one of its objects, so nothing is before it has been imported.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import Linear, LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper
    from typing_extensions import TypeIs

    from alignpro.models.token_lora import TokenLora


def is_peft_model(model: object) -> TypeIs[PeftModel]:
    """Whether a model is wrapped by peft."""
    if "peft" not in sys.modules:
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def is_adapted_layer(layer: object) -> TypeIs[BaseTunerLayer | AuxiliaryTrainingWrapper]:
    """Whether a layer is wrapped by peft: by an adapter, or because it is trained beside one."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)


def is_lora_layer(layer: object) -> TypeIs[LoraLayer]:
    """Whether a layer has a LoRA."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.lora import LoraLayer

    return isinstance(layer, LoraLayer)


def is_lora_linear(layer: object) -> TypeIs[Linear]:
    """Whether a layer is peft's linear layer with a LoRA, and of no class derived from it."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.lora import Linear

    return type(layer) is Linear


def is_token_lora(variant: object) -> TypeIs[TokenLora]:
    """Whether a variant of a LoRA layer is this project's, which acts on a subset of the tokens."""
    if "peft" not in sys.modules:
        return False
    from alignpro.models.token_lora import TokenLora

    return isinstance(variant, TokenLora)
