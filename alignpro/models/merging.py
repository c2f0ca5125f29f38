"""Merge a peft adapter into the weights of its model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignpro.errors import ModelError
from alignpro.models.admission import agree

if TYPE_CHECKING:
    from peft import PeftModel


def merge_adapter(model: PeftModel, name: str) -> PreTrainedModel:
    """Merge an adapter into its base model, which computes the same afterwards.

    Input embedding and output layer that share a weight no longer do if the adapter changes one of them.

    Args:
        model: The adapter on its base model; not to be used afterwards.
        name: The model's name in messages.

    Raises:
        ModelError: The adapter cannot be merged into weights.
    """
    before = _logits(model)
    try:
        _untie(model.get_base_model())
        merged: PreTrainedModel = model.merge_and_unload()
        # peft writes past the version counters, by which a copy of the weights in another layout detects that it is stale.
        torch.autograd.graph.increment_version(list(merged.parameters()))
        after = _logits(merged)
    except (AttributeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise _refusal(name, str(error)) from error
    if not agree(after, before, merged, merged.dtype):
        raise _refusal(name, "the merged weights compute something else")
    return merged


def _refusal(name: str, reason: str) -> ModelError:
    return ModelError(
        f"model {name}: its adapter cannot be merged into weights: {reason}; leave policy.adapter out, so that the adapter "
        "goes on training"
    )


@torch.no_grad()
def _logits(model: PeftModel | PreTrainedModel) -> Tensor:
    """The logits of a few tokens, (L, V) float32, without dropout."""
    runs: Any = model
    weight: Tensor = runs.get_input_embeddings().weight
    ids = torch.arange(min(8, len(weight)), device=weight.device)
    training = runs.training
    logits: Tensor = runs.eval()(input_ids=ids[None]).logits[0].float()
    runs.train(training)
    return logits


def _untie(model: Any) -> None:
    """Give the output layer a weight of its own if it shares the input embedding's and an adapter changes either."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    inner: list[Any] = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers]
    if inner[0].weight is inner[1].weight and any(isinstance(layer, BaseTunerLayer) for layer in layers):
        inner[1].weight = nn.Parameter(inner[1].weight.detach().clone())
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
