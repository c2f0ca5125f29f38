"""Memory of an update of `alignpro sft` and `alignpro reward`, from the configuration alone."""

from __future__ import annotations

from collections.abc import Callable

from transformers import AutoModelForSequenceClassification

from alignpro.config import RewardModelConfig, SFTConfig, TrainableModelConfig
from alignpro.planning.model_size import build_empty, measure, trained_weights, trains_all
from alignpro.planning.zero_memory import torch_memory


def supervised_update_bytes(config: SFTConfig | RewardModelConfig) -> Callable[[int], float]:
    """Return a function from the number of samples per pass to the bytes at the peak of an update.

    Each sequence counts with the longest length that the job admits; a sample of `alignpro reward` is a pair of them.

    Raises:
        ModelError: The model's configuration cannot be read.
    """
    section: TrainableModelConfig
    if isinstance(config, SFTConfig):
        section, longest, sequences = config.policy, config.max_tokens, 1
        model = build_empty(config.policy)
        trained, full = trained_weights(model, config.policy), trains_all(config.policy)
    else:
        section, longest, sequences = config.model, config.max_length, 2
        model = build_empty(config.model, AutoModelForSequenceClassification)
        trained, full = tuple(weight.numel() for weight in model.parameters()), True
    size = measure(model, section)
    updated = size if isinstance(config, SFTConfig) else size.plain
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or longest
    tokens = sequences * min(longest, context)
    held = size.parameters + (0 if full else sum(trained))
    state = torch_memory(trained, held * size.dtype_bytes, size.dtype_bytes)
    head = size.head_gradient_bytes if full else 0.0

    def update_bytes(samples: int) -> float:
        activations = updated.activation_bytes(samples * tokens, checkpointing=section.gradient_checkpointing)
        # Gradients of an earlier pass are there when the backward pass of a later one begins.
        earlier = state.gradients if samples < config.batch_size else 0.0
        begins = activations + head + earlier + state.backward
        return state.weights + state.optimizer + max(begins, state.gradients + state.backward)

    return update_bytes
