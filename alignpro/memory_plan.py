"""Memory a rank by ZeRO stage, from a configuration alone: `alignpro plan`. Nothing is loaded but the models' config.json.

Weights, gradients and optimizer states are counted as in Rajbhandari et al. (2020, "ZeRO", section 3), activations as in
Korthikanti et al. (2022, "Reducing Activation Recomputation", table 2) without the attention matrix, which is never held.
What the allocator and the libraries take beside is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from alignpro.config import AdapterConfig, ModelConfig, ModelRewardConfig, RLHFConfig, TrainConfig
from alignpro.distributed.frozen_memory import frozen_memory
from alignpro.errors import ModelError
from alignpro.models import DTYPES

GIB = float(1 << 30)
_ACTIVATION_BYTES = 34  # a token, a layer and a hidden unit, in 16 bits
_ADAM = 8  # two moments of 32 bits


@dataclass(frozen=True)
class ModelSize:
    """What of a model takes memory."""

    parameters: int
    layers: int
    hidden: int
    cache_bytes: int
    """Keys and values of one token, in all layers."""
    dtype_bytes: int


@dataclass(frozen=True)
class Need:
    """Bytes of one rank."""

    weights: float
    """Of the policy, and of its reference where that is another model."""
    gradients: float
    optimizer: float
    frozen: float
    """Target and reward models."""
    sampling_copy: float
    """Weights gathered for the rollout: the policy's at stage 3, the target's at a stage of its own."""
    cache: float
    """Keys and values of all sequences that run at once, each as long as it may become."""
    activations: float

    @property
    def rollout(self) -> float:
        """At the peak of sampling."""
        return self.weights + self.optimizer + self.frozen + self.sampling_copy + self.cache

    @property
    def update(self) -> float:
        """At the peak of training, when the cache has been given back."""
        return self.weights + self.optimizer + self.frozen + self.gradients + self.activations


def memory_table(config: TrainConfig | RLHFConfig, ranks: int, device_bytes: float | None = None) -> list[str]:
    """Lines of a table: GiB a rank for each stage, and whether it fits.

    Args:
        config: The job.
        ranks: Over how many it is spread.
        device_bytes: Memory of one device; when absent, nothing is said of fitting.

    Raises:
        ModelError: A model's configuration cannot be read.
    """
    columns = ("stage", "weights", "grads", "optimizer", "frozen", "copy", "KV", "activations", "rollout", "update")
    lines = ["  ".join(f"{column:>11}" for column in columns) + ("" if device_bytes is None else "  fits")]
    for stage in range(4):
        need = memory_need(config, stage, ranks)
        parts = (need.weights, need.gradients, need.optimizer, need.frozen, need.sampling_copy, need.cache)
        values = (*parts, need.activations, need.rollout, need.update)
        line = f"{f'z{stage}':>11}  " + "  ".join(f"{value / GIB:>11.2f}" for value in values)
        if device_bytes is not None:
            line += "  yes" if max(need.rollout, need.update) < device_bytes else "  no"
        lines.append(line)
    return lines


def memory_need(config: TrainConfig | RLHFConfig, stage: int, ranks: int) -> Need:
    """What one rank needs at a stage."""
    model = _build(config.policy)
    size = _size(model, config.policy)
    trained = _trained(model, config.policy.adapter)
    full = config.policy.adapter.kind == "full"
    half = size.dtype_bytes == 2
    held = size.parameters * size.dtype_bytes * (2 if full else 1) + (0 if full else trained * size.dtype_bytes)
    # DeepSpeed keeps a float32 copy from stage 1 on, and in 16 bits always.
    optimizer = trained * (_ADAM + (4 if half or stage > 0 else 0))
    gradients = trained * 4
    tokens, longest, frozen, gathered, cache = _rollout(config, size, ranks)
    if config.deepspeed.offload_reference and full and stage < 3:  # in the host's memory, but for its head
        held -= (size.parameters - model.get_output_embeddings().weight.numel()) * size.dtype_bytes
    per_token = _ACTIVATION_BYTES * size.hidden * size.dtype_bytes / 2
    layers = size.dtype_bytes * size.hidden * size.layers + per_token
    activations = tokens * (layers if config.policy.gradient_checkpointing else per_token * size.layers)
    return Need(
        weights=held / (ranks if stage == 3 else 1),
        gradients=gradients / (ranks if stage >= 2 else 1),
        optimizer=optimizer / (ranks if stage >= 1 else 1),
        frozen=frozen,
        sampling_copy=gathered + (size.parameters * size.dtype_bytes if stage == 3 else 0.0),
        cache=cache * longest if config.rollout.engine.pool_bytes is None else config.rollout.engine.pool_bytes,
        activations=activations,
    )


def _rollout(config: TrainConfig | RLHFConfig, policy: ModelSize, ranks: int) -> tuple[int, int, float, float, float]:
    """Tokens of a micro-batch; of the longest sequence; bytes of frozen models, and gathered of them; of a token's keys and
    values, × max_batch."""
    rewards = float(
        sum(_reward_bytes(each.model) for each in config.reward.components if isinstance(each, ModelRewardConfig))
    )
    frozen, gathered = frozen_memory(config.deepspeed, ranks, None, 0, rewards)
    cache = policy.cache_bytes
    if isinstance(config, TrainConfig):
        sampled, prompt = config.rollout.rewrite.max_tokens, config.prompting.max_prompt_tokens
        longest = max(prompt + sampled, prompt + config.rollout.respond.max_tokens)
        if config.target != "policy":
            model = _build(config.target_model)
            target = _size(model, config.target_model)
            frozen, gathered = frozen_memory(config.deepspeed, ranks, model, target.dtype_bytes, rewards)
            cache = max(cache, target.cache_bytes)
    else:
        sampled, prompt = config.rollout.respond.max_tokens, config.max_prompt_tokens
        longest = prompt + sampled
    tokens = config.optimizer.micro_batch_size * sampled + prompt
    return tokens, longest, frozen, gathered, float(cache * config.rollout.engine.max_batch)


def _reward_bytes(config: ModelConfig) -> int:
    size = _build(config, AutoModelForSequenceClassification)
    return sum(weight.numel() for weight in size.parameters()) * DTYPES[config.dtype].itemsize


def _build(config: ModelConfig, kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """A model without memory for its weights."""
    try:
        architecture = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
        with torch.device("meta"):
            model: PreTrainedModel = kind.from_config(architecture, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {config.path}: its configuration cannot be read: {error}") from error
    return model


def _size(model: PreTrainedModel, config: ModelConfig) -> ModelSize:
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    itemsize = DTYPES[config.dtype].itemsize
    return ModelSize(
        parameters=sum(weight.numel() for weight in model.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        cache_bytes=2 * text.num_hidden_layers * heads * width * itemsize,
        dtype_bytes=itemsize,
    )


def _trained(model: PreTrainedModel, adapter: AdapterConfig) -> int:
    """How many weights have a gradient."""
    if adapter.kind == "full":
        return sum(weight.numel() for weight in model.parameters())
    if adapter.kind == "soft_prompt":
        return adapter.virtual_tokens * int(model.config.get_text_config().hidden_size)
    head, names = model.get_output_embeddings(), adapter.target_modules
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and (layer is not head if names == "all-linear" else name.rpartition(".")[2] in names)
    ]
    return sum(adapter.rank * (layer.in_features + layer.out_features) for layer in layers)
