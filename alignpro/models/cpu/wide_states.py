"""Float32 hidden states in a model whose weights are bfloat16, on a CPU.

transformers computes everything in the dtype of the weights. Processors without arithmetic in bfloat16 take several times as
long for that as for float32, and each operation rounds its result. Here only what is stored is bfloat16: the weights of
linear layers are widened in registers (`alignpro_kernels.linear`), and embeddings and norms give float32. The passes of
training and of generation both compute so, and give what the same weights would give in float32.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignpro.models.cpu.fused_layers import FusedRMSNorm, fuse_norm, mix_in
from alignpro.models.cpu.packed_linear import PackedLinear, WideLinear, unpackable
from alignpro.models.peft_types import is_lora_layer

logger = logging.getLogger(__name__)


class _WideEmbedding(nn.Module):
    """An embedding that gives float32."""

    def forward(self, input: Tensor) -> Tensor:
        """(...) → (..., D) float32."""
        rows: Tensor = super().forward(input)
        return rows.float()


def widen_states(model: PreTrainedModel) -> bool:
    """Let a bfloat16 model on a CPU compute float32 states; if it cannot, say which part is in the way.

    Args:
        model: The model with its head. All its passes compute float32 states afterwards, slowly until its linear layers are
            packed.

    Returns:
        Whether it does.
    """
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return False
    if not has_wide_states(model) and (reason := obstacle(model)) is not None:
        logger.warning(
            "%s computes in bfloat16 on the CPU as transformers does, which is slow without arithmetic for it: %s; "
            "dtype=float32 is faster",
            type(model).__name__,
            reason,
        )
        return False
    for module in list(model.modules()):
        if isinstance(module, nn.Embedding):
            mix_in(module, _WideEmbedding)
        elif type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            module.__class__ = WideLinear
    return True


def has_wide_states(model: PreTrainedModel) -> bool:
    """Whether `widen_states` has changed a model."""
    # An adapter may have wrapped the embedding.
    return any(isinstance(module, _WideEmbedding) for module in model.get_input_embeddings().modules())


def narrow_states(model: nn.Module) -> None:
    """Undo `widen_states`, after `unpack_linear_layers`."""
    for module in model.modules():
        if isinstance(module, _WideEmbedding):
            module.__class__ = type(module).__mro__[2]
        elif type(module) is WideLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]


def obstacle(model: PreTrainedModel) -> str | None:
    """Return what is in the way of `widen_states`, such as a part that needs states in bfloat16; None if nothing is."""
    if (reason := unpackable(model.base_model)) is not None:
        return reason
    for name, module in model.named_modules():
        own = [weight for weight in module.parameters(recurse=False) if weight.dtype == torch.bfloat16]
        if (
            not own
            or isinstance(module, nn.Embedding | PackedLinear)
            or type(module) is nn.Linear
            or is_lora_layer(module)
        ):
            continue
        if type(module).__name__.endswith("RMSNorm") and not isinstance(module, FusedRMSNorm):
            fuse_norm(module)
        if not isinstance(module, FusedRMSNorm):
            return f"its {name} is a {type(module).__name__}"
    return None
