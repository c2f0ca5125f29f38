"""Random models of the supported architectures, small enough to build in milliseconds, and their tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)

from alignpro.config import AdapterConfig, PolicyConfig
from alignpro.demo.models import prompter_tokenizer, target_tokenizer
from alignpro.models.adapters import add_adapter
from alignpro.models.language_model import LanguageModel
from alignpro.models.sequences import SequenceBatch
from alignpro.policy.policy import Policy
from alignpro.policy.reference import frozen_copy
from alignpro_kernels import reference

Directory = Callable[[str], Path]
"""The fixture `model_directory`: architecture → directory with its model and tokenizer."""

CONTEXT = 128
WINDOW = 8
"""Sliding window of the models that have one; shorter than the tests' sequences."""

INVOCATION = "YZ"
ACTIVATED = AdapterConfig(kind="lora", rank=4, activated=True, invocation=INVOCATION)

IDS = torch.tensor([[5, 17, 3, 88, 41, 20]])
"""The input of models whose logits are compared."""

FULL = AdapterConfig(kind="full")
LORA = AdapterConfig(kind="lora", rank=4, alpha=8)
LORA_HEAD = AdapterConfig(kind="lora", rank=4, alpha=8, target_modules=["q_proj", "c_attn", "lm_head"])
SOFT = AdapterConfig(kind="soft_prompt", virtual_tokens=5)
ADAPTERS = {"full": FULL, "lora": LORA, "lora on the head": LORA_HEAD, "soft prompt": SOFT}

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2", "gemma2", "mistral", "phi3")


@cache
def tokenizer(architecture: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer with a token per byte for Qwen, whose class `AutoTokenizer` requires, else per character."""
    return prompter_tokenizer() if architecture.startswith("qwen") else target_tokenizer()


def tiny_config(architecture: str, **settings: Any) -> PreTrainedConfig:
    """Return a config: two layers, width 32, four query heads and, where supported, two key-value heads."""
    chars = tokenizer(architecture)
    common: dict[str, Any] = {
        "vocab_size": len(chars),
        "bos_token_id": chars.bos_token_id,
        "eos_token_id": chars.eos_token_id,
        "pad_token_id": chars.pad_token_id,
        "initializer_range": 0.2,  # far from uniform
        "tie_word_embeddings": architecture in ("qwen2", "gpt2"),
    }
    if architecture == "gpt2":
        return GPT2Config(**common | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT} | settings)
    common |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
    }
    if architecture == "gemma2":
        common |= {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "final_logit_softcapping": 3.0}
    if architecture == "qwen3":
        common |= {"head_dim": 8}
    if architecture == "mistral":
        common |= {"sliding_window": WINDOW}
    kinds = {
        "llama": LlamaConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
        "gemma2": Gemma2Config,
        "mistral": MistralConfig,
        "phi3": Phi3Config,
    }
    return kinds[architecture](**common | settings)


def tiny_transformer(
    architecture: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any
) -> PreTrainedModel:
    """Return a model with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        tiny_config(architecture, **settings), dtype=dtype, attn_implementation=attention(architecture)
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):  # initialised to zero, which would hide a missing bias
                weight.normal_(0, 0.2)
    return model.eval()


def tiny_language_model(architecture: str, **settings: Any) -> LanguageModel:
    """Return a frozen tiny model with its tokenizer."""
    model = LanguageModel(tiny_transformer(architecture, **settings), tokenizer(architecture), architecture)
    return model.requires_grad_(False)


def tiny_adapted(
    architecture: str = "llama", *, adapter: AdapterConfig = ACTIVATED, size: float = 0.2, **settings: Any
) -> LanguageModel:
    """Return a model with a nonzero LoRA, which holds all trainable weights."""
    model = add_adapter(tiny_language_model(architecture, **settings), adapter)
    return perturb(model.to(settings.get("dtype", torch.float32)), size)


def tiny_policy(
    architecture: str, adapter: str, *, temperature: float = 1.0, dtype: torch.dtype = torch.float32, drift: float = 0.2
) -> Policy:
    """Return a policy that differs from its reference, unless ``drift`` is 0."""
    model = add_adapter(tiny_language_model(architecture, dtype=dtype), ADAPTERS[adapter]).to(dtype)
    frozen = frozen_copy(model) if adapter == "full" else None
    return Policy(perturb(model, drift), frozen, temperature=temperature)


def perturb(model: LanguageModel, size: float = 0.2, seed: int = 9) -> LanguageModel:
    """Change the trained weights, as training does; a new LoRA has no effect before."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += size * torch.randn(weight.shape, generator=generator).to(weight.dtype)
    return model.eval()


def trainable(model: LanguageModel) -> list[str]:
    """Return the names of the trained weights."""
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


def head_logits(model: LanguageModel, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    """Return head(hidden), as the operators compute it: (B, L) → (B, L, V)."""
    return apply_head(model, model.hidden(ids, torch.ones_like(ids) if mask is None else mask))


def apply_head(model: LanguageModel, states: Tensor) -> Tensor:
    """Return the logits of hidden states: (..., D) → (..., V)."""
    head = model.head
    return reference.head_logits(states, head.weight, head.bias, 1.0, head.softcap, head.lora)


def gradients(model: LanguageModel, values: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a randomly weighted sum of the values, by name of the trained weight."""
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(0), dtype=values.dtype)
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    found = torch.autograd.grad((weights * values).sum(), list(named.values()), allow_unused=True)
    used = {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}
    assert used
    return used


def logits_by_peft(model: LanguageModel, sequences: SequenceBatch) -> Tensor:
    """Return the logits of each action, (N, V), by peft's own forward pass, row by row."""
    rows = []
    for prompt, completion in zip(sequences.prompts, sequences.completions, strict=True):
        logits = model.model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
        rows.append(logits[len(prompt) - 1 : len(prompt) - 1 + len(completion)])
    return torch.cat(rows)


def attention(architecture: str) -> str:
    """Return the attention implementation; SDPA ignores Gemma 2's soft cap on attention scores."""
    return "eager" if architecture == "gemma2" else "sdpa"


def save_tiny(architecture: str, directory: Path, **settings: Any) -> Path:
    """Save a model with its tokenizer."""
    tiny_transformer(architecture, **settings).save_pretrained(directory)
    tokenizer(architecture).save_pretrained(directory)
    return directory


def policy_config(path: Path | str, *, architecture: str = "llama", **settings: Any) -> PolicyConfig:
    """Return the configuration of a policy that starts from a directory, on the CPU."""
    return PolicyConfig.model_validate(
        {"path": str(path), "device": "cpu", "attention": attention(architecture)} | settings
    )


def ragged(count: int, vocabulary: int, *, shortest: int = 1, longest: int = 20, seed: int = 0) -> list[list[int]]:
    """Return ``count`` random token lists of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]
