"""What a forward pass keeps for the backward pass is what the plan counts, with fused modules and with transformers' own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import tiny_language_model

from alignpro.config import ModelConfig
from alignpro.models.cpu.packed_linear import no_kernels
from alignpro.models.language_model import LanguageModel
from alignpro.planning.model_size import ModelSize, measure

TOKENS = 96
SHAPE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_hidden_layers": 3}


def saved_bytes(model: LanguageModel) -> int:
    """Return the bytes of all tensors that a pass keeps, apart from the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    found: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights and x.shape.numel() >= TOKENS:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model.causal.base_model(input_ids=torch.arange(TOKENS).unsqueeze(0) % 100, use_cache=False)[0]
    assert out.requires_grad
    return sum(found.values())


def counted_bytes(size: ModelSize) -> float:
    """Return the plan's bytes without those that the backward pass needs when it begins."""
    few, more = (replace(size, layers=layers).activation_bytes(TOKENS, checkpointing=False) for layers in (1, 2))
    return size.layers * (more - few)


@pytest.mark.skipif(no_kernels() is not None, reason="there are no fused modules")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gathered", [False, True])
def test_the_plan_counts_what_is_kept(dtype: str, gathered: bool) -> None:
    model = tiny_language_model("llama", dtype=getattr(torch, dtype), **SHAPE).requires_grad_(True)
    size = measure(model.causal, ModelConfig(path="none", device="cpu", dtype=dtype))
    assert size.fused
    if gathered:  # as under ZeRO 3
        model.disable_packing()
        size = size.plain
    # The plan is of packed sequences, whose attention keeps some more copies than that of a single one.
    assert 0.85 < saved_bytes(model) / counted_bytes(size) < 1.0
