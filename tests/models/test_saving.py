"""What is saved is loaded again: models, adapters, and base models that exist nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_models import (
    ADAPTERS,
    IDS,
    LORA,
    SOFT,
    Directory,
    head_logits,
    perturb,
    policy_config,
    save_tiny,
    tiny_transformer,
    trainable,
)
from transformers import PreTrainedModel

from alignpro.config import AdapterConfig
from alignpro.errors import ModelError
from alignpro.models.adapters import add_adapter
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model, load_trainable
from alignpro.models.saving import BASE_DIRECTORY, save_pretrained


class TestSaving:
    @staticmethod
    def reload(model: LanguageModel, directory: Path, **settings: str) -> LanguageModel:
        save_pretrained(model, directory)
        return load_language_model(policy_config(directory, **settings))

    @pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
    def test_and_loading_gives_the_same_model(
        self, adapter: AdapterConfig, model_directory: Directory, tmp_path: Path
    ) -> None:
        start = load_trainable(policy_config(model_directory("llama")), 0)
        model = perturb(add_adapter(start, adapter))
        loaded = self.reload(model, tmp_path)
        assert torch.equal(head_logits(loaded), head_logits(model))
        assert not trainable(loaded)
        assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
        assert loaded.tokenizer.chat_template == model.tokenizer.chat_template
        assert not (tmp_path / BASE_DIRECTORY).exists()  # the base model stays where it is

    def test_writes_the_sets_of_an_adapter_in_order(self, model_directory: Directory, tmp_path: Path) -> None:
        """The order of a set changes from process to process."""
        adapter = LORA.model_copy(
            update={"target_modules": ["v_proj", "q_proj", "up_proj", "down_proj", "o_proj", "k_proj"]}
        )
        save_pretrained(add_adapter(load_trainable(policy_config(model_directory("llama")), 0), adapter), tmp_path)
        written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
        assert written == ["down_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]

    def test_in_bfloat16_and_loading_gives_the_same_model(self, model_directory: Directory, tmp_path: Path) -> None:
        start = load_trainable(policy_config(model_directory("llama"), dtype="bfloat16"), 0)
        model = perturb(add_adapter(start, LORA))
        assert torch.equal(head_logits(self.reload(model, tmp_path, dtype="bfloat16")), head_logits(model))

    @pytest.mark.parametrize("second", ADAPTERS.values(), ids=ADAPTERS)
    def test_a_saved_lora_is_merged_before_a_new_adapter_is_added(
        self, second: AdapterConfig, model_directory: Directory, tmp_path: Path
    ) -> None:
        first = perturb(add_adapter(load_trainable(policy_config(model_directory("llama")), 0), LORA))
        save_pretrained(first, tmp_path / "first")
        start = load_trainable(policy_config(tmp_path / "first"), 0)
        assert torch.equal(head_logits(start), head_logits(first))
        model = add_adapter(start, second)
        with model.disable_adapter():
            assert torch.allclose(head_logits(model), head_logits(first), atol=1e-4)
        perturb(model, seed=1)
        # The merged weights exist nowhere else, so they are saved with the new adapter and move with the directory.
        save_pretrained(model, tmp_path / "partial")
        (tmp_path / "partial").rename(tmp_path / "second")
        again = load_language_model(policy_config(tmp_path / "second"))
        assert torch.allclose(head_logits(again), head_logits(model), atol=1e-5)
        with again.disable_adapter(), model.disable_adapter():
            assert torch.allclose(head_logits(again), head_logits(model), atol=1e-5)

    @pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
    @pytest.mark.parametrize("architecture", ["llama", "qwen2"])
    def test_a_model_from_scratch_is_saved_whole(
        self, adapter: AdapterConfig, architecture: str, model_directory: Directory, tmp_path: Path
    ) -> None:
        start = load_trainable(policy_config(model_directory(architecture), from_scratch=True), 3)
        model = perturb(add_adapter(start, adapter))
        assert torch.allclose(head_logits(self.reload(model, tmp_path)), head_logits(model), atol=1e-5)

    def test_training_of_a_saved_soft_prompt_continues(self, model_directory: Directory, tmp_path: Path) -> None:
        first = perturb(add_adapter(load_trainable(policy_config(model_directory("llama")), 0), SOFT))
        save_pretrained(first, tmp_path / "first")
        model = add_adapter(load_trainable(policy_config(tmp_path / "first"), 0), SOFT)
        assert torch.equal(head_logits(model), head_logits(first))
        (name,) = trainable(model)
        assert "prompt_encoder" in name
        head_logits(model).square().sum().backward()
        assert dict(model.named_parameters())[name].grad is not None
        perturb(model, seed=1)
        assert torch.equal(head_logits(self.reload(model, tmp_path / "second")), head_logits(model))

    @pytest.mark.parametrize("kind", ["full", "lora"])
    def test_a_soft_prompt_cannot_become_another_adapter(
        self, kind: str, model_directory: Directory, tmp_path: Path
    ) -> None:
        save_pretrained(add_adapter(load_trainable(policy_config(model_directory("llama")), 0), SOFT), tmp_path)
        start = load_trainable(policy_config(tmp_path), 0)
        with pytest.raises(ModelError, match="soft prompt, which cannot be merged"):
            add_adapter(start, AdapterConfig.model_validate({"kind": kind}))

    def test_an_adapter_whose_base_is_gone(self, tmp_path: Path) -> None:
        base = save_tiny("llama", tmp_path / "somewhere")
        save_pretrained(add_adapter(load_trainable(policy_config(base), 0), LORA), tmp_path / "adapter")
        base.rename(tmp_path / "elsewhere")
        with pytest.raises(ModelError, match="somewhere"):
            load_language_model(policy_config(tmp_path / "adapter"))

    def test_saved_models_can_be_read_by_transformers_and_peft(
        self, model_directory: Directory, tmp_path: Path
    ) -> None:
        model = perturb(add_adapter(load_trainable(policy_config(model_directory("llama")), 0), LORA))
        save_pretrained(model, tmp_path)
        base: PreTrainedModel = tiny_transformer("llama")
        read = PeftModel.from_pretrained(base, str(tmp_path)).eval()
        assert torch.allclose(read(input_ids=IDS).logits, head_logits(model), atol=1e-5)
