"""Loading models from directories, and what is wrong with a directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
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
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, T5Config, T5ForConditionalGeneration

from alignpro.config import AdapterConfig, ModelConfig, PolicyConfig
from alignpro.errors import ModelError
from alignpro.models import loading
from alignpro.models.adapters import add_adapter
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model, load_trainable
from alignpro.models.saving import BASE_DIRECTORY, save_pretrained


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

    def test_auto_takes_bfloat16_only_where_it_is_exact_and_runs(
        self, model_directory: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(path: Path, **settings: object) -> LanguageModel:
            config = ModelConfig.model_validate(
                {"path": str(path), "tokenizer": str(path), "dtype": "auto", **settings}
            )
            return load_language_model(config)

        stored = save_tiny("llama", tmp_path / "llama", dtype=torch.bfloat16)
        assert load(model_directory("llama")).causal.dtype == torch.float32  # whose files are
        narrow, wide = load(stored), load(stored, dtype="float32")
        assert (narrow.causal.dtype, narrow.states_dtype) == (torch.bfloat16, torch.float32)
        assert (head_logits(narrow) - head_logits(wide)).abs().max() < 1e-4
        assert load(save_tiny("gpt2", tmp_path / "gpt2", dtype=torch.bfloat16)).causal.dtype == torch.float32
        monkeypatch.setattr(loading, "no_kernels", lambda: "there is no compiler")
        assert load(stored).causal.dtype == torch.float32

    def test_auto_is_not_for_trained_models(self) -> None:
        with pytest.raises(ValidationError, match=r"dtype\n.*'float64', 'float32', 'bfloat16' or 'float16'"):
            PolicyConfig.model_validate({"path": "p", "dtype": "auto"})

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

    @pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])  # whose embeddings are tied: it lacks no weight
    def test_the_head_of_a_reward_model_is_seen(self, architecture: str, tmp_path: Path) -> None:
        save_tiny(architecture, tmp_path)
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).save_pretrained(tmp_path)
        with pytest.raises(
            ModelError, match=r"have the head of a classifier \(score\.weight\), such as a reward model's"
        ):
            load_language_model(policy_config(tmp_path))

    @pytest.mark.parametrize("layers", ["num_hidden_layers", "n_layer"])
    def test_more_layers_than_the_configuration_counts(self, layers: str, tmp_path: Path) -> None:
        config = save_tiny("gpt2" if layers == "n_layer" else "llama", tmp_path) / "config.json"
        content = json.loads(config.read_text())
        content.pop("layer_types", None)
        config.write_text(json.dumps(content | {layers: 1}))
        with pytest.raises(
            ModelError, match=r"have \d+ weights of layers that its config\.json does not count, such as .*1\."
        ):
            load_language_model(policy_config(tmp_path))
        config.write_text(json.dumps(content | {layers: 1, "num_nextn_predict_layers": 1}))
        load_language_model(policy_config(tmp_path))  # those that predict further tokens are left out

    def test_weights_that_transformers_leaves_out_are_harmless(self, tmp_path: Path) -> None:
        save_tiny("llama", tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        unused = {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            "vision.blocks.7.weight": torch.ones(2),
        }
        save_file({**weights, **unused}, tmp_path / "model.safetensors", metadata={"format": "pt"})
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


class TestUnusualFiles:
    """Directories that are loaded as transformers loads them."""

    @staticmethod
    def check(directory: Path, ids: torch.Tensor = IDS) -> None:
        expected = AutoModelForCausalLM.from_pretrained(directory)(input_ids=ids).logits
        model = load_trainable(policy_config(directory), 0)
        assert torch.allclose(head_logits(model, ids), expected, atol=1e-4)
        for adapter in (AdapterConfig(), LORA):
            start = load_trainable(policy_config(directory), 0)
            start.model.name_or_path = BASE_DIRECTORY  # saved with the adapter
            save_pretrained(add_adapter(start, adapter), directory / "saved")
            again = load_language_model(policy_config(directory / "saved"))
            assert torch.allclose(head_logits(again, ids), expected, atol=1e-4)

    def test_untied_weights_of_a_tied_configuration(self, tmp_path: Path) -> None:
        save_tiny("llama", tmp_path)
        config = tmp_path / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
        self.check(tmp_path)

    def test_a_larger_vocabulary_than_the_tokenizers(self, tmp_path: Path) -> None:
        model = tiny_transformer("llama")
        model.resize_token_embeddings(120, mean_resizing=False)
        model.save_pretrained(tmp_path)
        tokenizer("llama").save_pretrained(tmp_path)
        self.check(tmp_path, torch.tensor([[5, 119, 103, 17]]))

    def test_shards(self, tmp_path: Path) -> None:
        tiny_transformer("llama").save_pretrained(tmp_path, max_shard_size="20KB")
        tokenizer("llama").save_pretrained(tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        self.check(tmp_path)

    def test_pickled_weights_only(self, tmp_path: Path) -> None:
        weights = save_tiny("llama", tmp_path) / "model.safetensors"
        torch.save(tiny_transformer("llama").state_dict(), tmp_path / "pytorch_model.bin")
        weights.unlink()
        self.check(tmp_path)

    def test_an_invalid_generation_config(self, tmp_path: Path) -> None:
        save_tiny("llama", tmp_path)
        settings = {"do_sample": False, "temperature": 0.5, "top_p": 0.9, "eos_token_id": 1, "pad_token_id": -1}
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        self.check(tmp_path)

    def test_a_pad_token_beyond_the_vocabulary(self, tmp_path: Path) -> None:
        config = save_tiny("llama", tmp_path) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": 103}))
        with pytest.raises(ModelError, match=f"{tmp_path}: its config.json names a pad_token_id beyond its vocabulary"):
            load_language_model(policy_config(tmp_path))
