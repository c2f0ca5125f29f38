"""Loading models from directories, and what is wrong with a directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    IDS,
    LORA,
    SOFT,
    Directory,
    head_logits,
    policy_config,
    save_tiny,
    tiny_transformer,
    tokenizer,
    trainable,
)
from transformers import AutoModelForSequenceClassification, T5Config, T5ForConditionalGeneration

from alignpro.config import AdapterConfig
from alignpro.errors import ModelError
from alignpro.models.adapters import add_adapter
from alignpro.models.loading import load_language_model, load_trainable


class TestLoading:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_a_directory_gives_its_model_frozen(self, architecture: str, model_directory: Directory) -> None:
        model = load_language_model(policy_config(model_directory(architecture), architecture=architecture))
        expected = tiny_transformer(architecture)(input_ids=IDS).logits
        assert torch.allclose(head_logits(model), expected, atol=1e-5)
        assert not trainable(model)
        assert not model.training

    def test_in_bfloat16(self, model_directory: Directory) -> None:
        model = load_language_model(policy_config(model_directory("llama"), dtype="bfloat16"))
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        exact = tiny_transformer("llama")(input_ids=IDS).logits
        assert (head_logits(model) - exact).abs().max() < 0.05 * exact.abs().max()

    def test_a_directory_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="nowhere"):
            load_language_model(policy_config(tmp_path / "nowhere"))

    def test_a_directory_without_weights(self, tmp_path: Path) -> None:
        (save_tiny("llama", tmp_path) / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=rf"{tmp_path}: cannot be loaded as a causal language model: .*no file"):
            load_language_model(policy_config(tmp_path))

    def test_a_directory_with_broken_weights(self, tmp_path: Path) -> None:
        weights = save_tiny("llama", tmp_path) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
            load_language_model(policy_config(tmp_path))

    def test_weights_of_another_shape(self, tmp_path: Path) -> None:
        config = save_tiny("llama", tmp_path) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 40}))
        with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
            load_language_model(policy_config(tmp_path))

    def test_a_reward_model_has_no_head_for_language(self, tmp_path: Path) -> None:
        save_tiny("llama", tmp_path)
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).save_pretrained(tmp_path)
        with pytest.raises(ModelError, match=r"lack 1 weights, such as lm_head\.weight"):
            load_language_model(policy_config(tmp_path))

    def test_a_model_that_is_not_causal(self, tmp_path: Path) -> None:
        config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path)
        tokenizer("llama").save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
            load_language_model(policy_config(tmp_path))

    def test_from_scratch_is_drawn_from_the_seed(self, model_directory: Directory) -> None:
        config = policy_config(model_directory("llama"), from_scratch=True)
        one, same, other = (load_trainable(config, seed) for seed in (1, 1, 2))
        assert torch.equal(head_logits(one), head_logits(same))
        assert not torch.allclose(head_logits(one), head_logits(other), atol=0.1)
        stored = load_language_model(policy_config(model_directory("llama")))
        assert not torch.allclose(head_logits(one), head_logits(stored), atol=0.1)

    def test_from_scratch_needs_no_weights(self, tmp_path: Path) -> None:
        (save_tiny("llama", tmp_path) / "model.safetensors").unlink()
        load_trainable(policy_config(tmp_path, from_scratch=True), 0)

    @pytest.mark.parametrize("adapter", [LORA, SOFT], ids=["lora", "soft prompt"])
    def test_an_adapter_starts_from_the_seed(self, adapter: AdapterConfig, model_directory: Directory) -> None:
        config = policy_config(model_directory("llama"))
        one, same, other = (add_adapter(load_trainable(config, seed), adapter) for seed in (1, 1, 2))
        weights = [
            torch.cat([weight.flatten() for weight in model.parameters() if weight.requires_grad])
            for model in (one, same, other)
        ]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])
