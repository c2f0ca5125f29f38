"""All layers in one call: equal to the separate layers, always with the current weights."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import ARCHITECTURES, tiny_transformer, tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignpro.models.attention_interface import install_attention
from alignpro.models.cpu.fused_decoder import unfuse_decoder
from alignpro.models.cpu.replacement import replace_modules
from alignpro.models.language_model import LanguageModel
from alignpro.models.paged_attention import PagedAttention
from alignpro_kernels import PagedKeys, backends

pytestmark = pytest.mark.skipif("no C++ compiler found" in (backends()["cpp"] or ""), reason="no C++ compiler")

FUSED = ("llama", "qwen2", "qwen3", "mistral")
TOKENS = 13  # longer than the sliding windows of the tiny models


def states(model: PreTrainedModel) -> Tensor:
    """Return the states, (TOKENS, D), of a forward pass of generation over an empty pool."""
    config = model.config
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pages = [torch.zeros(4, 2, 4, kv_heads, head_dim, dtype=model.dtype) for _ in range(config.num_hidden_layers)]

    def int32(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    span = torch.arange(TOKENS)
    level = PagedKeys(int32(0, TOKENS), int32(0, 1, 2, 3)[None], int32(TOKENS), span.int(), int32(0))
    with torch.no_grad():
        out: Tensor = model.base_model(
            input_ids=span[None],
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
            position_ids=span[None],
            use_cache=False,
            attention_backend=PagedAttention(pages, span, [level]),
        ).last_hidden_state[0]
    return out


def plain_and_fused(architecture: str, **settings: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    plain = tiny_transformer(architecture, **settings)
    for name, weight in plain.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(weight, 1.0, 0.3)
    install_attention(plain)
    return plain, fuse(copy.deepcopy(plain))


def fuse(model: PreTrainedModel) -> PreTrainedModel:
    replace_modules(model.base_model)
    return model


def is_fused(model: PreTrainedModel) -> bool:
    return type(model.base_model).__name__.startswith("FusedDecoder")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_equal_those_of_the_layers(architecture: str) -> None:
    plain, model = plain_and_fused(architecture)
    assert is_fused(model) == (architecture in FUSED)
    assert isinstance(model.base_model, type(plain.base_model))
    torch.testing.assert_close(states(model), states(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "biases"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
    ],
)
def test_biases_of_all_projections_are_fused(architecture: str, biases: dict[str, bool]) -> None:
    plain, model = plain_and_fused(architecture, **biases)
    assert is_fused(model)
    expected = states(plain)
    torch.testing.assert_close(states(model), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if name.endswith("proj.bias"):
                weight.mul_(1.5)
                model.get_parameter(name).mul_(1.5)
    assert not torch.allclose(states(plain), expected, atol=1e-2)
    torch.testing.assert_close(states(model), states(plain), rtol=1e-4, atol=1e-4)


def test_changes_of_weights_are_detected() -> None:
    plain, model = plain_and_fused("qwen2")
    before = states(model)
    for name in ("self_attn.q_proj.bias", "self_attn.v_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
        with torch.no_grad():
            for each in (plain, model):
                each.model.layers[1].get_parameter(name).mul_(1.5)
        after = states(model)
        assert not torch.equal(after, before), name
        torch.testing.assert_close(after, states(plain), rtol=1e-5, atol=2e-5, msg=name)
        before = after


@pytest.mark.parametrize("architecture", FUSED)
def test_changes_that_pytorch_does_not_count_take_effect_after_notification(architecture: str) -> None:
    """Fused optimizers and those that write shards make such changes. The most recent wrapper of the model is notified."""
    plain, model = plain_and_fused(architecture)
    states(model)
    trained = LanguageModel(model, tokenizer(architecture), "m")
    states(model)
    for name, weight in model.named_parameters():
        weight.data.mul_(1.5)
        plain.get_parameter(name).data.mul_(1.5)
    trained.weights_updated()
    torch.testing.assert_close(states(model), states(plain), rtol=1e-4, atol=1e-4)


def test_passes_with_gradients_use_the_plain_layers() -> None:
    plain, model = plain_and_fused("llama")
    ids = torch.arange(TOKENS)[None]
    for each in (plain, model):
        each(input_ids=ids, labels=ids).loss.backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5)


def test_a_hook_on_a_layer_is_called() -> None:
    _, model = plain_and_fused("llama")
    expected, called = states(model), []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(states(model), expected, rtol=1e-5, atol=1e-5)
    assert called == [1]
    handle.remove()
    assert torch.equal(states(model), expected) and called == [1]


@pytest.mark.parametrize("modules", [["q_proj", "down_proj"], ["embed_tokens"]])
def test_an_adapter_added_later_acts(modules: list[str]) -> None:
    plain, model = plain_and_fused("llama")
    config = LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
    found = []
    for each in (plain, model):
        torch.manual_seed(1)
        get_peft_model(each, config)
        found.append(states(each))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_a_copy_has_its_own_weights() -> None:
    _, model = plain_and_fused("llama")
    expected = states(model)
    other = copy.deepcopy(model)
    assert is_fused(other)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.zero_()
    assert not torch.allclose(states(other), expected)
    assert torch.equal(states(model), expected)


def test_layers_that_compute_something_else_are_not_fused(caplog: pytest.LogCaptureFixture) -> None:
    plain, _ = plain_and_fused("llama")
    other = copy.deepcopy(plain)
    other.model.layers[1].mlp.act_fn = nn.GELU()
    with caplog.at_level("INFO", "alignpro.models.cpu.fused_decoder"):
        assert not is_fused(fuse(other))
    assert "their outputs differ from the fused operator's" in caplog.text
    other = copy.deepcopy(plain)
    other.model.layers[1].mlp.scale = nn.Linear(2, 2)
    assert not is_fused(fuse(other))
    other = copy.deepcopy(plain)
    other.model.layers[1].self_attn.o_proj = nn.Linear(32, 32)
    assert not is_fused(fuse(other))


@pytest.mark.parametrize("width", [64, 4096])
def test_layers_of_different_sizes_are_not_fused(width: int, caplog: pytest.LogCaptureFixture) -> None:
    plain, _ = plain_and_fused("llama")
    mlp = plain.model.layers[1].mlp
    dim = plain.config.hidden_size
    assert width != plain.config.intermediate_size
    mlp.gate_proj, mlp.up_proj = (nn.Linear(dim, width, bias=False) for _ in range(2))
    mlp.down_proj = nn.Linear(width, dim, bias=False)
    other = copy.deepcopy(plain)
    with caplog.at_level("INFO", "alignpro.models.cpu.fused_decoder"):
        assert not is_fused(fuse(other))
    assert "their sizes differ from layer to layer" in caplog.text
    torch.testing.assert_close(states(other), states(plain), rtol=1e-5, atol=1e-5)


def test_the_default_dtype_does_not_matter() -> None:
    plain, model = plain_and_fused("llama")
    try:
        torch.set_default_dtype(torch.float64)
        again = fuse(copy.deepcopy(plain))
    finally:
        torch.set_default_dtype(torch.float32)
    assert is_fused(again) and torch.equal(states(again), states(model))


def test_a_model_in_another_dtype_runs_layer_by_layer() -> None:
    plain, model = plain_and_fused("llama")
    torch.testing.assert_close(states(model.double()), states(plain.double()))


def test_fusing_can_be_undone() -> None:
    plain, model = plain_and_fused("llama")
    unfuse_decoder(model)
    assert type(model.base_model) is type(plain.base_model)
    torch.testing.assert_close(states(model), states(plain), rtol=1e-5, atol=2e-5)
    assert is_fused(fuse(model))
