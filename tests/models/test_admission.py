"""Models that are refused, since they would be trained or sampled incorrectly."""

from __future__ import annotations

import pytest
from peft import PrefixTuningConfig, get_peft_model
from tiny_models import Directory, policy_config, tiny_transformer, tokenizer
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from alignpro.errors import ModelError
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


class TestRefusals:
    """Unsupported models, which would be trained or sampled incorrectly."""

    @pytest.mark.parametrize(
        ("architecture", "config"),
        [
            (CohereForCausalLM, CohereConfig(**SMALL, logit_scale=0.0625)),
            (GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=8.0)),
            (
                BertLMHeadModel,
                BertConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}, is_decoder=True),
            ),
        ],
        ids=["Cohere", "Granite", "BERT"],
    )
    def test_logits_that_are_not_head_of_hidden(self, architecture: type, config: object) -> None:
        with pytest.raises(ModelError, match=rf"m: the logits of {architecture.__name__} are not its output layer"):
            LanguageModel(architecture(config), tokenizer("llama"), "m")

    def test_a_scale_of_one_is_accepted(self) -> None:
        LanguageModel(GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=1.0)), tokenizer("llama"), "m")

    def test_a_recurrent_model(self) -> None:
        model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, state_size=4))
        with pytest.raises(ModelError, match="MambaForCausalLM is not supported"):
            LanguageModel(model, tokenizer("llama"), "m")

    def test_attention_that_ignores_the_soft_cap(self, model_directory: Directory) -> None:
        config = policy_config(model_directory("gemma2"), attention="sdpa")
        with pytest.raises(ModelError, match="attention=eager"):
            load_language_model(config)

    def test_a_virtual_token_adapter_other_than_a_soft_prompt(self) -> None:
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        with pytest.raises(ModelError, match="PREFIX_TUNING is not supported"):
            LanguageModel(get_peft_model(tiny_transformer("llama"), config), tokenizer("llama"), "m")

    def test_a_model_with_its_own_positions(self) -> None:
        model = tiny_transformer("llama")
        decoder = model.model
        forward = decoder.forward

        def with_its_own(*args, position_ids=None, **kwargs):
            return forward(*args, **kwargs)

        decoder.forward = with_its_own
        with pytest.raises(ModelError, match=r"cannot share their prompt"):
            LanguageModel(model, tokenizer("llama"), "own")
