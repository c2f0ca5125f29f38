"""Packed sequences with shared prompts give the states and gradients of separate sequences, on every architecture."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    WINDOW,
    gradients,
    perturb,
    ragged,
    tiny_language_model,
    tiny_transformer,
    tokenizer,
)
from torch import Tensor, nn

from alignpro.config import AdapterConfig
from alignpro.models.adapters import add_adapter
from alignpro.models.language_model import LanguageModel
from alignpro.models.sequences import SequenceBatch

SHARED = [[3, 5, 7, 2, 9, 11, 4, 6, 8, 10], [12], [13, 14, 15]]
"""Prompts, one longer than a sliding window."""
PROMPTS = [SHARED[i] for i in (0, 0, 0, 1, 1, 2)]
BEGINNING = [15, 3, 8, 9, 1, 1, 4, 7, 2, 6, 12, 5]
"""A common prefix of prompts, longer than a sliding window."""
COMPLETIONS = [[1, 2, 3, 4], list(range(20, 20 + 2 * WINDOW)), [6], [7, 8], [], [9, 10, 11]]


def apart(model: LanguageModel, prompts: list[list[int]]) -> Tensor:
    """Return the states of each action, from one forward pass per sequence."""
    rows = []
    for prompt, completion in zip(prompts, COMPLETIONS, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        states = model.hidden(ids, torch.ones_like(ids))[0]
        rows.append(states[len(prompt) - 1 : len(prompt) - 1 + len(completion)])
    return torch.cat(rows)


def assert_shared_as_apart(model: LanguageModel) -> None:
    for prompts in (PROMPTS, [BEGINNING + prompt for prompt in PROMPTS]):
        batch = SequenceBatch.build(prompts, COMPLETIONS)
        shared, unshared = model.action_states(batch), apart(model, prompts)
        close(shared, unshared)
        ours, truth = gradients(model, shared), gradients(model, unshared)
        assert ours.keys() == truth.keys()
        for name, gradient in ours.items():
            close(gradient, truth[name])


def close(ours: Tensor, truth: Tensor) -> None:
    """Compare up to float32's rounding: transformers computes norms and rotary angles in float32 even in float64 models."""
    assert (ours - truth).norm() <= 2e-6 * truth.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_and_gradients_equal_those_of_separate_sequences(architecture: str) -> None:
    assert_shared_as_apart(tiny_language_model(architecture, dtype=torch.float64).requires_grad_(True))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_with_every_attention_implementation(attention: str) -> None:
    model = tiny_transformer("mistral", dtype=torch.float64)
    model.set_attn_implementation(attention)
    assert_shared_as_apart(LanguageModel(model, tokenizer("mistral"), attention).requires_grad_(True))


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(kind="lora", rank=2, alpha=4.0, target_modules="all-linear"),
        AdapterConfig(kind="soft_prompt", virtual_tokens=3),
    ],
    ids=lambda adapter: adapter.kind,
)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral"])
def test_with_an_adapter(architecture: str, adapter: AdapterConfig) -> None:
    model = perturb(add_adapter(tiny_language_model(architecture, dtype=torch.float64), adapter), 0.1)
    assert_shared_as_apart(model)
    with model.disable_adapter():
        batch = SequenceBatch.build(PROMPTS, COMPLETIONS)
        close(model.action_states(batch), apart(model, PROMPTS))


def test_under_gradient_checkpointing() -> None:
    model = tiny_language_model("llama", dtype=torch.float64).requires_grad_(True)
    batch = SequenceBatch.build(PROMPTS, COMPLETIONS)
    plain = gradients(model, model.action_states(batch))
    model.enable_gradient_checkpointing()
    again = gradients(model, model.action_states(batch))
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-12, atol=1e-12)


def test_shared_prompts_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_language_model("llama")
    rows = []
    layer: nn.Module = model.causal.model.layers[0].mlp  # type: ignore[union-attr,index]
    layer.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[:2].numel()))
    K, X, R = 8, 30, 12
    prompts = [prompt for prompt in ragged(3, 50, shortest=X, longest=X) for _ in range(K)]
    completions = ragged(3 * K, 50, shortest=R, longest=R, seed=1)
    model.action_states(SequenceBatch.build(prompts, completions))
    assert rows == [3 * (X + K * (R - 1))]


def test_all_completions_empty() -> None:
    model = tiny_language_model("llama")
    assert model.action_states(SequenceBatch.build([[1, 2], [1, 2]], [[], []])).shape == (0, 32)
    assert model.action_states(SequenceBatch.build([[1, 2], [3]], [[4], [5]])).shape == (2, 32)
