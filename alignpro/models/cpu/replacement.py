"""Replace the modules of a model on a CPU by faster ones that compute the same, and undo it."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from alignpro.models.cpu.fused_decoder import fuse_decoder, unfuse_decoder
from alignpro.models.cpu.fused_layers import fuse_layers
from alignpro.models.cpu.packed_linear import PackedWeights, pack_linear_layers, unpack_linear_layers
from alignpro.models.cpu.wide_states import narrow_states


def replace_modules(model: PreTrainedModel) -> PackedWeights | None:
    """Pack the linear layers of a model, but not its output layer, and fuse what can be fused; after `widen_states`.

    Returns:
        The packed weights, to be invalidated after changes of the weights; None if the model is left as it is.
    """
    decoder = model.base_model
    packed_weights = pack_linear_layers(decoder)
    if packed_weights is not None:
        fuse_layers(decoder)
        fuse_decoder(decoder, packed_weights)
    return packed_weights


def replace_layers(model: PreTrainedModel) -> bool:
    """Pack the linear layers of a frozen model that transformers' own passes run, and fuse its norms and gated MLPs.

    Args:
        model: The model with its output layer, which stays as it is; after `widen_states`.

    Returns:
        Whether its layers are packed; otherwise it is left as it is.
    """
    if pack_linear_layers(model.base_model) is None:
        return False
    fuse_layers(model.base_model)
    return True


def restore_modules(model: nn.Module) -> None:
    """Undo the packing, the fused decoder and wide states, for a model whose weights are gathered anew for each pass."""
    unfuse_decoder(model)
    unpack_linear_layers(model)
    narrow_states(model)
