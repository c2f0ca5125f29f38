"""A model as decoder and head: logits, padding, context, gradient checkpointing."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, CONTEXT, FULL, IDS, SOFT, head_logits, ragged, tiny_language_model, tokenizer
from transformers import OPTConfig, OPTForCausalLM

from alignpro.config import AdapterConfig
from alignpro.engine import Engine, SamplingParams
from alignpro.errors import ModelError
from alignpro.models.adapters import add_adapter
from alignpro.models.language_model import LanguageModel


class TestDecoderAndHead:
    def test_give_the_logits_of_the_model(self, any_model: LanguageModel) -> None:
        assert torch.allclose(head_logits(any_model), any_model.causal(input_ids=IDS).logits, atol=1e-5)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_do_not_depend_on_padding(self, any_model: LanguageModel, side: str) -> None:
        prompts = ragged(5, 100, longest=20)
        ids, mask = torch.zeros(5, 20, dtype=torch.int64), torch.zeros(5, 20, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            place = slice(20 - len(prompt), 20) if side == "left" else slice(0, len(prompt))
            ids[row, place], mask[row, place] = torch.tensor(prompt), True
        padded = head_logits(any_model, ids, mask)
        for row, prompt in enumerate(prompts):
            alone = any_model.causal(input_ids=torch.tensor([prompt])).logits[0]
            assert torch.allclose(padded[row, mask[row]], alone, atol=1e-5)

    def test_know_their_context_and_vocabulary(self, any_model: LanguageModel) -> None:
        assert any_model.context_length == CONTEXT
        assert any_model.vocabulary == len(any_model.tokenizer) == any_model.head.weight.shape[0]

    @pytest.mark.parametrize("tied", [True, False])
    def test_share_one_weight_with_the_embedding_when_tied(self, tied: bool) -> None:
        model = tiny_language_model("llama", tie_word_embeddings=tied)
        embedding = model.causal.get_input_embeddings().weight
        assert (model.head.weight.data_ptr() == embedding.data_ptr()) == tied
        assert torch.allclose(head_logits(model), model.causal(input_ids=IDS).logits, atol=1e-5)


class TestGradientCheckpointing:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize("adapter", [FULL, SOFT], ids=["full", "soft prompt"])
    def test_recomputes_and_gives_the_same_gradients(self, architecture: str, adapter: AdapterConfig) -> None:
        gradients, calls = [], []
        for checkpointing in (False, True):
            model = add_adapter(tiny_language_model(architecture), adapter).eval()
            if checkpointing:
                model.enable_gradient_checkpointing()
            layer = next(m for name, m in model.causal.named_modules() if name.endswith(("layers.0.mlp", "h.0.mlp")))
            layer.register_forward_pre_hook(lambda *_, on=checkpointing: calls.append(on))
            head_logits(model).square().sum().backward()
            gradients.append({n: w.grad for n, w in model.named_parameters() if w.requires_grad})
        assert calls == [False, True, True]
        for name, gradient in gradients[0].items():
            assert torch.equal(gradient, gradients[1][name]), name

    def test_keeps_dropout_off_and_generation_unchanged(self) -> None:
        plain, model = tiny_language_model("gpt2"), tiny_language_model("gpt2")  # its dropout is 0.1
        model.enable_gradient_checkpointing()
        assert torch.equal(head_logits(model.requires_grad_(True)), head_logits(plain))
        assert not any(module.training for module in model.modules())
        drawn = [Engine({"m": m}).generate("m", [[1, 2, 3]], SamplingParams(max_tokens=8)) for m in (plain, model)]
        assert drawn[0] == drawn[1]

    def test_is_refused_if_layers_apply_their_own_dropout(self) -> None:
        config = OPTConfig(vocab_size=50, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2)
        config.word_embed_proj_dim = 32
        model = LanguageModel(OPTForCausalLM(config), tokenizer("llama"), "m")
        with pytest.raises(ModelError, match=r"dropout=0\.1: set it to 0"):
            model.enable_gradient_checkpointing()
