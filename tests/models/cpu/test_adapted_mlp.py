"""A gated MLP with LoRAs as one function: results and gradients of the separate modules, and less memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from alignpro.models.cpu import fused_layers
from alignpro.models.cpu.replacement import replace_modules
from alignpro_kernels import backends

pytestmark = pytest.mark.skipif("no C++ compiler found" in (backends()["cpp"] or ""), reason="no C++ compiler")

RANK = 4
ALL = ["gate_proj", "up_proj", "down_proj"]


def adapted(targets: list[str], *, replaced: bool, dtype: torch.dtype = torch.float32, **options: float) -> PeftModel:
    """A small Llama with LoRAs whose B is not zero; the same weights each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False, **options)
    ).to(dtype)
    model.eval()
    if replaced:
        replace_modules(model.get_base_model().base_model)
    return model


def gradients(model: PeftModel) -> dict[str, Tensor]:
    ids = torch.arange(60).view(2, 30) % 50
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the rows of each call of the fused function."""
    found: list[int] = []
    original: Callable[..., Tensor] = fused_layers.adapted_mlp

    def recorded(x: Tensor, *projections: object) -> Tensor:
        found.append(x.shape[:-1].numel())
        return original(x, *projections)

    monkeypatch.setattr(fused_layers, "adapted_mlp", recorded)
    return found


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "gate_proj"], ["down_proj"], ["q_proj", "v_proj"]])
def test_gradients_are_as_exact_as_those_of_the_modules(targets: list[str], calls: list[int]) -> None:
    model = adapted(targets, replaced=True)
    calls.clear()
    ours = gradients(model)
    assert calls == [60, 60]
    plain = gradients(adapted(targets, replaced=False))
    exact = gradients(adapted(targets, replaced=False, dtype=torch.float64))
    assert ours.keys() == plain.keys() == exact.keys()
    for name, true in exact.items():
        allowed = 1.5 * float((plain[name].double() - true).abs().max()) + 1e-6 * float(true.abs().max())
        assert float((ours[name].double() - true).abs().max()) <= allowed, name


def test_passes_with_and_without_gradients_give_the_same_states() -> None:
    model = adapted(ALL, replaced=True)
    ids = torch.arange(30)[None]
    with_gradients = model(input_ids=ids).logits.detach()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, with_gradients)


def test_switched_off_adapters_add_nothing(calls: list[int]) -> None:
    model, ids = adapted(ALL, replaced=True), torch.arange(30)[None]
    calls.clear()
    with model.disable_adapter(), torch.no_grad():
        base = model(input_ids=ids).logits
    assert calls == []  # without low-rank terms, gates are combined inside the products
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(weight)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, base, rtol=1e-5, atol=1e-5)


def test_dropout_in_training_and_trained_weights_run_as_modules(calls: list[int]) -> None:
    model = adapted(ALL, replaced=True, lora_dropout=0.5).train()
    calls.clear()
    gradients(model)
    assert calls == []
    model.eval()
    gradients(model)
    assert calls == [60, 60]
    model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_(True)
    found = gradients(model)
    assert calls == [60, 60, 60] and any("up_proj.base_layer" in name for name in found)


def test_the_backward_pass_keeps_two_vectors_of_the_inner_width() -> None:
    model = adapted(ALL, replaced=True)
    mlp, x = model.get_base_model().model.layers[0].mlp, torch.randn(40, 64, requires_grad=True)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = mlp(x)
    assert sum(saved.values()) == 4 * 40 * (64 + 2 * 96 + 3 * RANK)
    out.sum().backward()
    assert x.grad is not None
