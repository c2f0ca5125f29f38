"""Replace the modules of a model on a CPU by faster ones that compute the same, and undo it."""

from __future__ import annotations

from torch import nn

from alignpro.models.cpu.fused_decoder import fuse_decoder, unfuse_decoder
from alignpro.models.cpu.fused_layers import fuse_layers
from alignpro.models.cpu.packed_linear import PackedWeights, pack_linear_layers, unpack_linear_layers


def replace_modules(model: nn.Module) -> PackedWeights | None:
    """Pack the linear layers of a model without its head and fuse what can be fused.

    Returns:
        The packed weights, to be invalidated after changes of the weights; None if the model is left as it is.
    """
    packed_weights = pack_linear_layers(model)
    if packed_weights is not None:
        fuse_layers(model)
        fuse_decoder(model, packed_weights)
    return packed_weights


def restore_modules(model: nn.Module) -> None:
    """Undo the packing and the fused decoder, for a model whose weights are gathered anew for each pass."""
    unfuse_decoder(model)
    unpack_linear_layers(model)
