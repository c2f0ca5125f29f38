"""The layers of a frozen model that transformers' own passes run, such as a reward model, on a CPU.

A causal language model is a `LanguageModel`, which replaces its modules itself and tries them in training and generation. Here
linear layers are packed, norms and gated MLPs are fused, and weights in bfloat16 are read as they are with float32 states:
transformers multiplies in bfloat16, for which most processors have no instructions.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignpro.models.admission import agree
from alignpro.models.cpu.replacement import replace_layers, restore_modules
from alignpro.models.cpu.wide_states import widen_states
from alignpro_kernels import cpp_library

logger = logging.getLogger(__name__)

_TOKENS = 24
"""Tokens of the sequence that is tried."""


@torch.no_grad()
def replace_frozen_layers(model: PreTrainedModel, name: str) -> None:
    """Replace the layers of a frozen model on a CPU by faster ones, unless they compute something else.

    Args:
        model: The model, on its device and in evaluation mode; on another device it is left as it is.
        name: Its name in messages.
    """
    if model.device.type != "cpu":
        return
    narrow = model.dtype == torch.bfloat16
    widen_states(model)
    plain = _states(model)
    if not replace_layers(model):
        return
    rounded = narrow and cpp_library.state_parts() == 1
    if not agree(_states(model), plain, model, torch.bfloat16 if rounded else torch.float32):
        restore_modules(model)
        logger.warning("%s runs as transformers has it: packed layers would compute something else", name)


def _states(model: PreTrainedModel) -> Tensor:
    """The last hidden states of some tokens, (T, D) float32."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    usable = [i for i in range(embedding.num_embeddings) if i != embedding.padding_idx]
    ids = torch.tensor([[usable[i % len(usable)] for i in range(_TOKENS)]])
    states: Tensor = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    return states.float()
