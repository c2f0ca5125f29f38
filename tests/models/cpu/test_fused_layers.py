"""Fused norms and gated layers: equal to those of transformers, on every architecture."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import ARCHITECTURES, tiny_transformer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from alignpro.models.cpu.replacement import replace_modules
from alignpro_kernels import backends

needs_cpp = pytest.mark.skipif("no C++ compiler found" in (backends()["cpp"] or ""), reason="no C++ compiler")


def states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.base_model(input_ids=ids).last_hidden_state
    return out


def wide_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(weight)
    return model


def fused(model: PreTrainedModel) -> list[str]:
    """Return the names of the replaced layers."""
    replace_modules(model.base_model)
    kinds = ("FusedRMSNorm", "FusedGatedMLP")
    return [name for name, module in model.named_modules() if type(module).__name__.startswith(kinds)]


@needs_cpp
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_equal_those_of_the_plain_model(architecture: str) -> None:
    plain = tiny_transformer(architecture)
    for name, weight in plain.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.normal_(weight, 1.0, 0.3)
    ids = torch.arange(14).view(2, 7)
    model = copy.deepcopy(plain)
    names = fused(model)
    if architecture != "gpt2":  # which has other norms
        assert any("norm" in name for name in names)
    torch.testing.assert_close(states(model, ids), states(plain, ids), rtol=1e-5, atol=1e-5)


@needs_cpp
def test_gated_layers_and_norms_of_a_llama() -> None:
    plain = wide_llama()
    model = copy.deepcopy(plain)
    names = fused(model)
    assert {name.rpartition(".")[2] for name in names} == {
        "mlp",
        "norm",
        "input_layernorm",
        "post_attention_layernorm",
    }
    assert isinstance(model.model.layers[0].mlp, type(plain.model.layers[0].mlp))
    assert fused(model) == names  # fusing again changes nothing
    ids = torch.arange(30).view(1, 30)
    torch.testing.assert_close(states(model, ids), states(plain, ids), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for weights in (plain, model):
            weights.model.layers[0].mlp.up_proj.weight.mul_(2)
            weights.model.norm.weight.mul_(3)
    torch.testing.assert_close(states(model, ids), states(plain, ids), rtol=1e-5, atol=1e-5)


@needs_cpp
def test_gradients_equal_those_of_the_plain_model() -> None:
    plain = wide_llama()
    model = copy.deepcopy(plain)
    fused(model)
    ids = torch.arange(30).view(1, 30)
    for each in (plain, model):
        each(input_ids=ids, labels=ids).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5, msg=name)


@needs_cpp
def test_layers_that_compute_something_else_are_not_fused() -> None:
    class ClippedRMSNorm(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).clamp(-1, 1)

    model = wide_llama()
    model.model.norm = ClippedRMSNorm(64, eps=1e-6)
    model.model.layers[0].mlp.act_fn = nn.GELU()
    names = fused(model)
    assert "model.norm" not in names and "model.layers.0.mlp" not in names and "model.layers.1.mlp" in names


@needs_cpp
def test_an_adapter_added_later_acts() -> None:
    plain, model = wide_llama(), wide_llama()
    fused(model)
    config = LoraConfig(r=2, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    expected = get_peft_model(plain, config)
    torch.manual_seed(1)
    ours = get_peft_model(model, config)
    ids = torch.arange(30).view(1, 30)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_a_model_without_packed_layers_is_unchanged() -> None:
    model = wide_llama().to(torch.bfloat16)
    assert fused(model) == []
