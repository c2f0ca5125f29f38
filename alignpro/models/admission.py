"""Which models are admitted: those for which this project computes what transformers computes.

A model is tried on a few tokens when it is loaded, so that no architecture or adapter is silently mishandled.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from peft import PeftModel, PeftType
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

from alignpro.errors import ModelError
from alignpro.models.head import Head
from alignpro.models.sequences import PackedSequences, SequenceBatch
from alignpro_kernels.reference import head_logits

_SOFT_PROMPTS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)


class Candidate(Protocol):
    """What is tried of a `LanguageModel`; see there."""

    name: str
    model: PreTrainedModel | PeftModel

    @property
    def causal(self) -> PreTrainedModel: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def virtual_tokens(self) -> int: ...
    @property
    def head(self) -> Head: ...
    def logits(self, ids: Tensor) -> Tensor: ...
    def hidden(self, ids: Tensor, attention_mask: Tensor) -> Tensor: ...
    def packed_states(self, packed: PackedSequences) -> Tensor: ...
    def disable_adapter(self) -> AbstractContextManager[None]: ...


def check_adapter(name: str, soft_prompt: Any) -> None:
    """Refuse a soft prompt of an unsupported kind.

    Args:
        name: The model's name in messages.
        soft_prompt: The peft configuration of the active soft prompt, or None.

    Raises:
        ModelError: It is of another kind.
    """
    if soft_prompt is not None and soft_prompt.peft_type not in _SOFT_PROMPTS:
        raise ModelError(
            f"model {name}: a peft adapter of type {soft_prompt.peft_type.value} is not supported; "
            f"soft prompts are of type {' or '.join(kind.value for kind in _SOFT_PROMPTS)}"
        )


def check_layers(name: str, causal: PreTrainedModel) -> None:
    """Refuse layers that cannot share prefixes, and attention that does not compute what the configuration says.

    Raises:
        ModelError: The model has recurrent layers, or a soft cap that its attention ignores.
    """
    config = causal.config.get_text_config()
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers):
        raise ModelError(
            f"model {name}: {type(causal).__name__} is not supported: it has recurrent layers, whose state "
            "does not allow padding and shared prefixes"
        )
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is not None and config._attn_implementation == "sdpa":
        raise ModelError(
            f"model {name}: its attention scores have a soft cap ({softcap}), which attention=sdpa does not "
            "compute: set attention=eager (or flash_attention_2, where that is installed)"
        )


@torch.no_grad()
def check_outputs(model: Candidate) -> None:
    """Compare logits with transformers' own, and packed sequences with separate ones, with the adapter on and off.

    Raises:
        ModelError: They differ, or the model cannot be run in this way.
    """
    ids = torch.tensor([[0, 1]], device=model.device)
    modes = {module: module.training for module in model.model.modules()}
    model.model.eval()
    kind = type(model.causal).__name__
    for adapter in (model.disable_adapter, nullcontext) if isinstance(model.model, PeftModel) else (nullcontext,):
        with adapter():
            try:
                expected = model.logits(ids)
                hidden, head = model.hidden(ids, torch.ones_like(ids)), model.head
                logits = head_logits(hidden, head.weight, head.bias, 1.0, head.softcap, head.lora).float()
                unshared, shared = _shared_and_unshared_states(model)
            except (AttributeError, TypeError, ValueError) as error:
                raise ModelError(f"model {model.name}: {kind} is not supported: {error}") from error
        tolerance = max(1e-4, 4 * torch.finfo(head.weight.dtype).eps) * expected.abs().max()
        if (logits - expected).abs().max() > tolerance:
            raise ModelError(
                f"model {model.name}: the logits of {kind} are not its output layer applied to "
                "its last hidden states (a logit scale, or a special head or adapter): not supported"
            )
        tolerance = max(1e-4, 8 * torch.finfo(shared.dtype).eps) * unshared.abs().max()
        if (shared - unshared).abs().max() > tolerance:
            raise ModelError(
                f"model {model.name}: the attention of {kind} treats positions or masks in a "
                "special way, so that sequences cannot share their prompt: not supported"
            )
    for module, mode in modes.items():
        module.training = mode


def _shared_and_unshared_states(model: Candidate) -> tuple[Tensor, Tensor]:
    """Compute the states of two sequences that share a prompt, separately and packed: (6, D) each."""
    prompt, completions = [0, 1], [[0, 1, 0], [1, 1, 1]]
    batch = SequenceBatch.build([prompt, prompt], completions, model.device)
    ids = torch.tensor([[*prompt, *completion] for completion in completions], device=model.device)
    unshared = model.hidden(ids, torch.ones_like(ids))[:, 1:-1].flatten(0, 1)
    return unshared, model.packed_states(batch.pack(model.virtual_tokens))
