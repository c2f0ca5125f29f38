"""Models that are refused, since they would be trained or sampled incorrectly."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from tiny_models import IDS, Directory, policy_config, tiny_language_model, tiny_transformer, tokenizer
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    DeepseekV3Config,
    DiffLlamaConfig,
    DogeConfig,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Ministral3Config,
)

from alignpro.engine import Engine, SamplingParams
from alignpro.errors import DataError, ModelError
from alignpro.models.admission import agree
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model
from alignpro.models.sequences import SequenceBatch
from alignpro.models.thresholds import Threshold, lowered, thresholds

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


def phi3_with_longrope(original: int = 32) -> LanguageModel:
    """A model whose rotary embedding has other frequencies in sequences longer than ``original`` tokens."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 8.0, 2.0, 3.0],
        "original_max_position_embeddings": original,
    }
    settings = {"max_position_embeddings": 256, "original_max_position_embeddings": original, "eos_token_id": None}
    model = tiny_transformer("phi3", initializer_range=0.3, rope_parameters=rope, **settings)
    return LanguageModel(model, tokenizer("phi3"), "phi3").requires_grad_(False)


class TestLengths:
    """Lengths at which a model begins to compute something else."""

    SHORT, LONG = list(range(10, 20)), [10 + i % 50 for i in range(60)]

    def test_sequences_end_where_the_frequencies_of_longrope_change(self) -> None:
        model = phi3_with_longrope()
        assert model.context_length == 32
        greedy = SamplingParams(max_tokens=8, temperature=0.0)
        ids = torch.tensor([self.SHORT])
        expected = model.causal.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        engine = Engine({"m": model})
        for _ in range(2):  # the second time from the cache
            (short,), (long,) = engine.generate("m", [self.SHORT, self.LONG], greedy)
            assert short.tokens == expected[0, 10:].tolist()
            assert long.error is not None
            assert "the context of 32 tokens of phi3" in long.error

    def test_training_passes_end_there_too(self) -> None:
        model = phi3_with_longrope()
        with pytest.raises(DataError, match="a sequence of 68 tokens does not fit in the context of 32 tokens of phi3"):
            model.action_states(SequenceBatch.build([self.SHORT, self.LONG], [self.SHORT, self.SHORT[:8]]))

    def test_longrope_within_its_original_context_has_no_limit(self) -> None:
        assert phi3_with_longrope(original=256).context_length == 256

    @pytest.mark.parametrize("window", [8, 40])
    def test_windows_that_are_only_masks(self, window: int) -> None:
        """Doge's layers do not pass their window to the attention; transformers' mask has it."""
        config = DogeConfig(**SMALL | {"num_hidden_layers": 2}, sliding_window=window, max_position_embeddings=64)
        model = AutoModelForCausalLM.from_config(config).eval()
        with pytest.raises(
            ModelError, match="m: the attention of DogeForCausalLM treats positions or masks in a special"
        ):
            LanguageModel(model, tokenizer("llama"), "m")

    def test_a_length_is_lowered_everywhere_and_restored(self) -> None:
        model = tiny_transformer("gemma2")
        config = copy.deepcopy(model.config.to_dict())
        (window,) = thresholds(model.config)
        assert window == Threshold("sliding_window", 8)
        short, long = IDS, IDS.repeat(1, 2)
        before = model(long).logits
        with lowered(model, window, 2):
            assert not torch.allclose(model(short).logits, before[:, :6], atol=0.1)
        assert torch.equal(model(long).logits, before)
        assert model.config.to_dict() == config

    def test_a_length_that_no_sequence_exceeds_does_not_matter(self) -> None:
        assert not thresholds(tiny_transformer("mistral", sliding_window=4096).config)

    def test_the_fused_decoder_is_compared_beyond_them(self) -> None:
        """Ministral 3 scales queries from a position on, which the fused operator does not."""
        rope = {
            "rope_type": "default",
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 5.0,
            "original_max_position_embeddings": 32,
        }
        config = Ministral3Config(
            **SMALL, head_dim=16, max_position_embeddings=128, rope_parameters=rope, tie_word_embeddings=False
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        prompt = [10 + i % 30 for i in range(40)]
        ids = torch.tensor([prompt])
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 40:].tolist()
        language_model = LanguageModel(model, tokenizer("llama"), "m").requires_grad_(False)
        params = SamplingParams(max_tokens=6, temperature=0.0)
        assert Engine({"m": language_model}).generate("m", [prompt], params)[0][0].tokens == expected


class TestPages:
    """Attention over keys and values of earlier passes."""

    def test_attention_that_runs_twice_in_a_layer(self) -> None:
        model = AutoModelForCausalLM.from_config(DiffLlamaConfig(**SMALL)).eval()
        with pytest.raises(ModelError, match="DiffLlamaForCausalLM does not give the same over keys and values kept"):
            LanguageModel(model, tokenizer("llama"), "m")

    def test_keys_and_values_of_different_shapes(self) -> None:
        sizes = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
        model = AutoModelForCausalLM.from_config(DeepseekV3Config(**SMALL, **sizes, first_k_dense_replace=1)).eval()
        with pytest.raises(ModelError, match="its keys and values differ in shape"):
            LanguageModel(model, tokenizer("llama"), "m")


class TestNotFinite:
    """Outputs that are NaN or infinite."""

    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    def test_are_refused_at_load(self, architecture: str) -> None:
        model = tiny_transformer(architecture)
        layer = "h.0.mlp.c_proj" if architecture == "gpt2" else "layers.0.mlp.up_proj"
        model.base_model.get_submodule(layer).weight.data[0, 0] = torch.nan
        with pytest.raises(ModelError, match="model m: its outputs are not finite"):
            LanguageModel(model, tokenizer(architecture), "m")

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("weight", ["embed_tokens", "layers.1.mlp.down_proj"])
    def test_end_a_run_of_the_engine(self, weight: str, temperature: float) -> None:
        """Weights may become NaN in training; and a few tokens do not show every overflow."""
        model = tiny_language_model("llama")
        engine = Engine({"m": model}, audit=True)
        params = SamplingParams(max_tokens=4, temperature=temperature)
        (before,) = engine.generate("m", [[5, 6]], params)[0]
        saved = model.causal.base_model.get_submodule(weight).weight.data
        good = saved[7, 7].item()
        saved[7, 7] = torch.nan
        engine.weights_updated("m")
        with pytest.raises(ModelError, match="model llama: its outputs are not finite"):
            engine.generate("m", [[7, 7]], params)
        saved[7, 7] = good
        engine.weights_updated("m")
        assert engine.generate("m", [[5, 6]], params)[0][0] == before

    def test_of_a_weight_beyond_a_dtypes_range_name_it(self) -> None:
        model = tiny_transformer("llama")
        model.base_model.layers[0].mlp.up_proj.weight.data[0, 0] = 3.4e38  # which bfloat16 rounds to infinity
        with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight holds NaN or infinity in bfloat16"):
            LanguageModel(model.to(torch.bfloat16), tokenizer("llama"), "m")

    def test_of_float16_name_the_dtype(self) -> None:
        model = tiny_transformer("llama", dtype=torch.float16)
        weight = model.base_model.layers[0].mlp.up_proj.weight.data
        weight.mul_(1e5).clamp_(-6e4, 6e4)  # finite, unlike what it is multiplied with
        with pytest.raises(ModelError, match=r"with float16, try bfloat16 or float32"):
            LanguageModel(model, tokenizer("llama"), "m")


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([2e-4, 7e-5], True),  # a fine-tuned SmolLM2: two of twelve tokens amplify rounding
        ([2e-4] * 3, False),  # more of them are another computation
        ([5e-2], False),  # and so is one by more
        ([float("nan")], False),
    ],
)
def test_rounding_may_be_amplified_at_few_tokens(errors: list[float], expected: bool) -> None:
    logits = torch.ones(12, 4)
    changed = logits.clone()
    for token, error in enumerate(errors):
        changed[token] *= 1 + error
    assert agree(changed, logits, tiny_transformer("llama"), torch.float32) is expected
