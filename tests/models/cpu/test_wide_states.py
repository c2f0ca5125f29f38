"""Models in bfloat16 on a CPU: the states of the same weights in float32, in training and in generation."""

from __future__ import annotations

import copy
import logging
from itertools import chain

import pytest
import torch
from tiny_models import ADAPTERS, perturb, tiny_language_model
from torch import nn

from alignpro.config import AdapterConfig, OptimizerConfig
from alignpro.engine import Engine, SamplingParams
from alignpro.models.adapters import add_adapter
from alignpro.models.cpu.packed_linear import PackedLinear
from alignpro.models.language_model import LanguageModel
from alignpro.models.sequences import SequenceBatch
from alignpro.training.backend import TorchBackend
from alignpro_kernels import backends, cpp_library, linear_logprob

pytestmark = pytest.mark.skipif("no C++ compiler found" in (backends()["cpp"] or ""), reason="no C++ compiler")
ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "phi3"]
PROMPTS = [[3, 4, 5, 6, 7], [8, 9]]
CLOSE = 1e-4 if cpp_library.unavailable() is None and cpp_library.state_parts() == 2 else 1e-5
"""Of log-probabilities: where AMX multiplies, states have 16 significant bits."""


def widened(model: LanguageModel) -> LanguageModel:
    """The same model with its weights widened to float32."""
    causal = copy.deepcopy(model.causal)
    for module in causal.modules():  # its modules are those of transformers again
        original = next(c for c in type(module).__mro__ if c.__module__.split(".")[0] in ("transformers", "torch"))
        if type(module) is not original:
            module.__class__ = original
    return LanguageModel(causal.float().eval(), model.tokenizer, "widened").requires_grad_(False)


def draw(model: LanguageModel) -> tuple[list[list[int]], list[list[float]]]:
    groups = Engine({"m": model}, audit=True).generate("m", PROMPTS, SamplingParams(max_tokens=9, n=3, seed=1))
    completions = [completion for group in groups for completion in group]
    return [list(c.tokens) for c in completions], [list(c.logprobs) for c in completions]


def batch_of(tokens: list[list[int]]) -> SequenceBatch:
    return SequenceBatch.build([prompt for prompt in PROMPTS for _ in range(3)], tokens, torch.device("cpu"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_are_those_of_float32(architecture: str) -> None:
    model = tiny_language_model(architecture, dtype=torch.bfloat16)
    wide = widened(model)
    assert model.states_dtype == wide.states_dtype == torch.float32
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    (tokens, logprobs), (expected_tokens, expected) = draw(model), draw(wide)
    assert tokens == expected_tokens
    assert list(chain.from_iterable(logprobs)) == pytest.approx(list(chain.from_iterable(expected)), abs=CLOSE)
    batch = batch_of(tokens)
    states = model.action_states(batch)
    assert states.dtype == torch.float32
    # Narrow layers in float32 are not packed, and so have another order of additions.
    torch.testing.assert_close(states, wide.action_states(batch), rtol=CLOSE, atol=CLOSE)


def test_an_embedding_that_is_scaled_in_bfloat16_stays_so() -> None:
    model = tiny_language_model("gemma2", dtype=torch.bfloat16)
    assert model.states_dtype == torch.float32
    batch = batch_of(draw(model)[0])
    states, wide = model.action_states(batch), widened(model).action_states(batch)
    assert 0 < (states - wide).norm() < 2e-2 * wide.norm()


def test_a_model_with_parts_of_another_kind_computes_in_bfloat16(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = tiny_language_model("gpt2", dtype=torch.bfloat16)
    assert "GPT2LMHeadModel computes in bfloat16 on the CPU" in caplog.text
    assert "its transformer.h.0.ln_1 is a LayerNorm" in caplog.text
    assert model.states_dtype == torch.bfloat16
    assert model.action_states(batch_of(draw(model)[0])).dtype == torch.bfloat16


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_sampling_and_training_compute_the_same_before_and_after_an_update(adapter: str) -> None:
    model = add_adapter(tiny_language_model("llama", dtype=torch.bfloat16), ADAPTERS[adapter]).eval()
    model = perturb(model, 0.05)
    backend = TorchBackend(
        {name: w for name, w in model.named_parameters() if w.requires_grad},
        OptimizerConfig(learning_rate=1e-3),
        10,
    )
    previous = None
    for _ in range(3):
        model.weights_updated()
        tokens, drawn = draw(model)
        batch = batch_of(tokens)
        head = model.head
        values = linear_logprob(model.action_states(batch), head.weight, batch.targets, **head.options).logprob
        assert (values - torch.tensor(list(chain.from_iterable(drawn)))).abs().max() < CLOSE
        weights = [weight.clone() for weight in backend.weights.values()]
        assert previous is None or any(not torch.equal(a, b) for a, b in zip(weights, previous, strict=True))
        previous = weights
        backend.backward(-values.mean())
        assert backend.step() > 0


def test_an_adapter_on_the_embedding_and_the_head_leaves_the_states_wide() -> None:
    adapter = AdapterConfig(kind="lora", rank=2, target_modules=["embed_tokens", "lm_head", "down_proj"])
    model = perturb(add_adapter(tiny_language_model("llama", dtype=torch.bfloat16, tie_word_embeddings=False), adapter))
    assert model.states_dtype == torch.float32
    tokens, drawn = draw(model)
    batch, head = batch_of(tokens), model.head
    values = linear_logprob(model.action_states(batch), head.weight, batch.targets, **head.options).logprob
    assert (values - torch.tensor(list(chain.from_iterable(drawn)))).abs().max() < CLOSE


def test_gradients_are_those_of_float32_rounded_once() -> None:
    model = tiny_language_model("llama", dtype=torch.bfloat16)
    wide = widened(model)
    batch = batch_of([[5, 6, 7]] * 6)
    gradients = []
    for each in (model, wide):
        each.requires_grad_(True)
        head = each.head
        linear_logprob(each.action_states(batch), head.weight, batch.targets).logprob.sum().backward()
        gradients.append({name: weight.grad for name, weight in each.causal.named_parameters()})
    for name, gradient in gradients[0].items():
        expected = gradients[1][name]
        assert gradient.dtype == torch.bfloat16
        assert (gradient.float() - expected).norm() <= 4e-3 * expected.norm() + 1e-6, name


def test_a_sharded_model_computes_in_bfloat16_again() -> None:
    model = tiny_language_model("llama", dtype=torch.bfloat16)
    assert any(type(module) is PackedLinear for module in model.modules())
    model.disable_packing()
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)}
    assert kinds == {nn.Linear, nn.Embedding}
    assert model.states_dtype == torch.bfloat16
    assert model.action_states(batch_of([[5, 6, 7]] * 6)).dtype == torch.bfloat16


def test_other_devices_and_dtypes_are_left_alone() -> None:
    for dtype in (torch.float32, torch.float64):
        model = tiny_language_model("llama", dtype=dtype)
        assert model.states_dtype == dtype
        assert type(model.causal.get_input_embeddings()) is nn.Embedding


def test_layers_of_an_odd_width_are_trained_too() -> None:
    """Their gradients would need panels of the transposed weight, whose inputs are their outputs."""
    model = tiny_language_model("llama", dtype=torch.bfloat16, intermediate_size=67)
    model.requires_grad_(True)
    head, batch = model.head, batch_of([[5, 6, 7]] * 6)
    linear_logprob(model.action_states(batch), head.weight, batch.targets).logprob.sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.causal.parameters())
