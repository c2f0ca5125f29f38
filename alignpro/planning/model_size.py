"""Sizes of a model's weights, KV cache and activations, from its config.json alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alignpro.config import ModelConfig, PolicyConfig
from alignpro.errors import ModelError
from alignpro.models.cpu.packed_linear import MAX_PACKED_BYTES, no_kernels
from alignpro.models.loading import base_of_adapter, is_adapter, resolve_dtype
from alignpro.prompting.pretrained import require_pretrained


@dataclass(frozen=True)
class ModelSize:
    """The dimensions of a language model."""

    weights: tuple[int, ...]
    """Number of elements of each weight; a tied weight counts once."""
    head: int
    """Number of elements of the output layer's weight; 0 without one over the vocabulary."""
    linear: int
    """Number of elements of the linear layers without the head; those of GPT-2 are `Conv1D`, with the weight transposed."""
    packed: int
    """Number of elements of those that have a second layout on a CPU, which a `Conv1D` has not."""
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    """Number of elements of a token's keys in one layer."""
    dtype_bytes: int
    """Bytes of an element of a weight."""
    states_bytes: int
    """Bytes of an element of a hidden state, a key or a value; with weights in bfloat16 on a CPU, these are float32."""
    fused: bool
    """Whether its gated MLPs recompute a part in the backward pass, as on a CPU (`gated_mlp`)."""

    @property
    def parameters(self) -> int:
        """Number of elements of all weights."""
        return sum(self.weights)

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return self.parameters * self.dtype_bytes

    @property
    def plain(self) -> ModelSize:
        """The same model computed by transformers' own modules, as where its weights are gathered for each pass."""
        return replace(self, states_bytes=self.dtype_bytes, fused=False)

    @property
    def head_bytes(self) -> int:
        """Bytes of the output layer."""
        return self.head * self.dtype_bytes

    @property
    def head_gradient_bytes(self) -> float:
        """Bytes of the output layer's gradient in float32 and in the weights' dtype, which is the same for float32."""
        return self.head * (4.0 if self.dtype_bytes == 4 else 4.0 + self.dtype_bytes)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of one token, in all layers."""
        return 2 * self.layers * self.kv_width * self.states_bytes

    @property
    def pass_bytes(self) -> int:
        """Bytes per token at the peak of a pass without gradients, which is inside a gated MLP."""
        return (2 * self.intermediate + 4 * self.hidden) * self.states_bytes

    def activation_bytes(self, tokens: int, *, checkpointing: bool) -> float:
        """Bytes that a forward pass saves for the backward pass, plus what the latter needs when it begins.

        Counted for a layer like Llama's (two norms, attention that stores no score matrix, a gated MLP). Per token it saves
        four vectors of the MLP's width, about ten of the model's width, and three of the width of keys and values; in 16
        bits its norms also save float32. Korthikanti et al. (2022, "Reducing Activation Recomputation", table 2) count
        another layer in this way. A fused MLP saves two vectors of its width, and its backward pass needs one more.

        Args:
            tokens: Number of tokens in the pass.
            checkpointing: Whether only the layers' inputs are saved, and one layer at a time is recomputed.
        """
        b, wide, hidden = self.states_bytes, self.intermediate, self.hidden
        saved, needed = (2, 3) if self.fused else (4, 2)
        layer = b * (saved * wide + 10.5 * hidden + 3 * self.kv_width) + (4 * hidden if b == 2 else 0)
        layers = self.layers * b * hidden + layer if checkpointing else self.layers * layer
        ends = 3.3 * b * hidden  # embeddings and the last norm
        gradients = b * (needed * wide + 2 * hidden)  # inside the last layer
        return tokens * (layers + ends + gradients)


def build_empty(config: ModelConfig, kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """Build a model on the meta device, without memory for its weights; of an adapter, its base model.

    Raises:
        ModelError: There is no such model, or its configuration cannot be read.
    """
    require_pretrained(config.path)
    try:
        path = config.path
        while is_adapter(path):
            path = base_of_adapter(Path(path))
        architecture = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        with torch.device("meta"):
            model: PreTrainedModel = kind.from_config(architecture, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {config.path}: its configuration cannot be read: {error}") from error
    return model


def measure(model: PreTrainedModel, config: ModelConfig) -> ModelSize:
    """Return the size of a model in the dtype that its configuration asks for.

    Raises:
        ModelError: Its configuration lacks a dimension.
    """
    text, dtype = model.config.get_text_config(), resolve_dtype(config)
    packable = config.device == "cpu" and dtype in MAX_PACKED_BYTES and no_kernels() is None
    head: Any = model.get_output_embeddings()
    layers = [each for each in model.modules() if isinstance(each, nn.Linear | Conv1D) and each is not head]
    packed = sum(each.weight.numel() for each in layers if isinstance(each, nn.Linear))
    try:
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return ModelSize(
            weights=tuple(weight.numel() for weight in model.parameters()),
            head=0 if head is None else head.weight.numel(),
            linear=sum(each.weight.numel() for each in layers),
            packed=packed,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            kv_width=heads * width,
            dtype_bytes=dtype.itemsize,
            states_bytes=torch.float32.itemsize if packable else dtype.itemsize,
            fused=packable and packed * dtype.itemsize <= MAX_PACKED_BYTES[dtype] and _has_gated_mlps(model),
        )
    except AttributeError as error:
        raise ModelError(
            f"model {config.path}: its memory cannot be planned, since its configuration lacks a dimension: {error}; to train "
            "it, set optimizer.micro_batch_size to a number"
        ) from error


def _has_gated_mlps(model: PreTrainedModel) -> bool:
    """Whether a model has MLPs of the kind that `fused_layers` replaces."""
    if getattr(model.config.get_text_config(), "hidden_act", None) != "silu":
        return False
    parts = ([getattr(each, f"{name}_proj", None) for name in ("gate", "up", "down")] for each in model.modules())
    return any(all(isinstance(part, nn.Linear) and part.bias is None for part in mlp) for mlp in parts)


def goes_on_training(policy: PolicyConfig) -> bool:
    """Whether the policy is an adapter that goes on training."""
    return policy.adapter.kind is None and is_adapter(policy.path)


def trains_all(policy: PolicyConfig) -> bool:
    """Whether all weights are trained."""
    return policy.adapter.kind == "full" or (policy.adapter.kind is None and not is_adapter(policy.path))


def trained_weights(model: PreTrainedModel, policy: PolicyConfig) -> tuple[int, ...]:
    """Return the number of elements of each weight that has a gradient.

    Raises:
        ModelError: The weights of an adapter that goes on training cannot be read.
    """
    adapter = policy.adapter
    if goes_on_training(policy):
        file = Path(policy.path) / "adapter_model.safetensors"
        try:
            with safe_open(file, "pt") as weights:
                return tuple(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(f"model {policy.path}: {file.name} cannot be read: {error}") from error
    if trains_all(policy):
        return tuple(weight.numel() for weight in model.parameters())
    if adapter.kind == "soft_prompt":
        return (adapter.virtual_tokens * int(model.config.get_text_config().hidden_size),)
    head, names = model.get_output_embeddings(), adapter.target_modules
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
        and (layer is not head if names == "all-linear" else name.rpartition(".")[2] in names)
    ]
    return tuple(adapter.rank * width for layer in layers for width in layer.weight.shape)
