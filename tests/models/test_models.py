"""Loading models, adding adapters, saving: which weights are trained, what the reference is, what reloading gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from tiny_models import (
    ARCHITECTURES,
    CONTEXT,
    policy_config,
    ragged,
    save_tiny,
    tiny_language_model,
    tiny_transformer,
    tokenizer,
)
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from alignpro.config import AdapterConfig
from alignpro.engine import Engine, SamplingParams
from alignpro.errors import ModelError
from alignpro.models.adapters import add_adapter
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model, load_trainable
from alignpro.models.saving import BASE_DIRECTORY, save_pretrained
from alignpro.policy.reference import fingerprint, frozen_copy
from alignpro_kernels.reference import head_logits

Directory = Callable[[str], Path]

IDS = torch.tensor([[5, 17, 3, 88, 41, 20]])
FULL = AdapterConfig()
LORA = AdapterConfig(kind="lora", rank=4, alpha=8)
LORA_HEAD = AdapterConfig(kind="lora", rank=4, alpha=8, target_modules=["q_proj", "lm_head"])
SOFT = AdapterConfig(kind="soft_prompt", virtual_tokens=5)
ADAPTERS = [
    pytest.param(FULL, id="full"),
    pytest.param(LORA, id="lora"),
    pytest.param(LORA_HEAD, id="lora on the head"),
    pytest.param(SOFT, id="soft prompt"),
]


def logits(model: LanguageModel, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    """Return head(hidden), as the operators compute it."""
    hidden, head = model.hidden(ids, torch.ones_like(ids) if mask is None else mask), model.head
    return head_logits(hidden, head.weight, head.bias, 1.0, head.softcap, head.lora)


def shake(model: LanguageModel, size: float = 0.3, seed: int = 0) -> LanguageModel:
    """Change the trained weights, as training does; a new LoRA has no effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += size * torch.randn(weight.shape, generator=generator)
    return model.eval()


def trainable(model: LanguageModel) -> list[str]:
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


class TestDecoderAndHead:
    def test_give_the_logits_of_the_model(self, any_model: LanguageModel) -> None:
        assert torch.allclose(logits(any_model), any_model.causal(input_ids=IDS).logits, atol=1e-5)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_do_not_depend_on_padding(self, any_model: LanguageModel, side: str) -> None:
        prompts = ragged(5, 100, longest=20)
        ids, mask = torch.zeros(5, 20, dtype=torch.int64), torch.zeros(5, 20, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            place = slice(20 - len(prompt), 20) if side == "left" else slice(0, len(prompt))
            ids[row, place], mask[row, place] = torch.tensor(prompt), True
        padded = logits(any_model, ids, mask)
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
        assert torch.allclose(logits(model), model.causal(input_ids=IDS).logits, atol=1e-5)


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


class TestLoading:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_a_directory_gives_its_model_frozen(self, architecture: str, model_directory: Directory) -> None:
        model = load_language_model(policy_config(model_directory(architecture), architecture=architecture))
        expected = tiny_transformer(architecture)(input_ids=IDS).logits
        assert torch.allclose(logits(model), expected, atol=1e-5)
        assert not trainable(model)
        assert not model.training

    def test_in_bfloat16(self, model_directory: Directory) -> None:
        model = load_language_model(policy_config(model_directory("llama"), dtype="bfloat16"))
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        exact = tiny_transformer("llama")(input_ids=IDS).logits
        assert (logits(model) - exact).abs().max() < 0.05 * exact.abs().max()

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
        assert torch.equal(logits(one), logits(same))
        assert not torch.allclose(logits(one), logits(other), atol=0.1)
        stored = load_language_model(policy_config(model_directory("llama")))
        assert not torch.allclose(logits(one), logits(stored), atol=0.1)

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


class TestAdapters:
    def test_full_trains_everything(self) -> None:
        model = add_adapter(tiny_language_model("llama"), FULL)
        assert len(trainable(model)) == len(list(model.parameters()))

    def test_lora_trains_its_own_weights_on_all_linear_layers_but_the_head(self) -> None:
        names = trainable(add_adapter(tiny_language_model("llama"), LORA))
        assert len(names) == 2 * 2 * 7  # A and B; two layers; q, k, v, o, gate, up, down
        assert all(".lora_" in name and "lm_head" not in name for name in names)

    def test_soft_prompt_trains_its_embeddings(self) -> None:
        model = add_adapter(tiny_language_model("llama"), SOFT)
        (name,) = trainable(model)
        assert "prompt_encoder" in name
        assert dict(model.named_parameters())[name].shape == (5, 32)

    def test_a_soft_prompt_starts_at_embeddings_of_the_vocabulary(self) -> None:
        model = add_adapter(tiny_language_model("llama"), SOFT)
        prompt = model.model.get_prompt(batch_size=1)[0]  # (5, D)
        embedding = model.causal.get_input_embeddings().weight
        assert torch.cdist(prompt, embedding).min(1).values.max() < 1e-3

    def test_a_soft_prompt_starts_from_a_text(self, model_directory: Directory) -> None:
        start = load_trainable(policy_config(model_directory("llama")), 0)
        model = add_adapter(start, AdapterConfig(kind="soft_prompt", virtual_tokens=5, init_text="hello"))
        embedding = model.causal.get_input_embeddings()
        hello = start.tokenizer("hello", add_special_tokens=False, return_tensors="pt").input_ids
        assert torch.equal(model.model.get_prompt(batch_size=1), embedding(hello))

    @pytest.mark.parametrize("adapter", ADAPTERS[1:])
    def test_switched_off_is_the_base_model_to_the_bit(self, adapter: AdapterConfig) -> None:
        base = logits(tiny_language_model("llama"))
        model = shake(add_adapter(tiny_language_model("llama"), adapter))
        names = trainable(model)
        on = logits(model)
        assert (on - base).abs().max() > 0.1
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
            with model.disable_adapter():
                pass
            assert torch.equal(logits(model), base)  # leaving the inner block does not switch it on again
        assert torch.equal(logits(model), on)
        assert trainable(model) == names

    def test_switched_off_in_a_frozen_model_stays_frozen(self) -> None:
        model = add_adapter(tiny_language_model("llama"), LORA).requires_grad_(False)
        with model.disable_adapter():
            pass
        assert not trainable(model)

    @pytest.mark.parametrize("adapter", ADAPTERS[1:])
    def test_gives_the_logits_of_pefts_own_forward(self, adapter: AdapterConfig) -> None:
        model = shake(add_adapter(tiny_language_model("llama"), adapter))
        assert torch.allclose(logits(model), model.model(input_ids=IDS).logits[:, -6:], atol=1e-5)

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lora_on_the_head_is_part_of_the_head(self, tied: bool, dtype: torch.dtype) -> None:
        start = tiny_language_model("llama", dtype=dtype, tie_word_embeddings=tied)
        before = start.head.weight.clone()
        model = shake(add_adapter(start, LORA_HEAD))
        a, b = (dict(model.named_parameters())[f"model.base_model.model.lm_head.lora_{x}.default.weight"] for x in "AB")
        assert torch.allclose(
            model.head.merged, before + (2.0 * b @ a).to(dtype), atol=2e-2 if dtype == torch.bfloat16 else 1e-6
        )  # α / r = 2
        assert model.head.weight.data_ptr() == start.head.weight.data_ptr()  # the adapter is not merged into the weight
        assert model.head.merged.dtype == dtype
        expected = model.model(input_ids=IDS).logits.float()
        assert (logits(model) - expected).abs().max() < (
            1e-4 if dtype == torch.float32 else 0.02
        ) * expected.abs().max()
        logits(model).sum().backward()
        assert a.grad is not None

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_generation_with_a_soft_prompt_is_greedy_in_pefts_own_forward(self, architecture: str) -> None:
        model = shake(add_adapter(tiny_language_model(architecture), SOFT))
        for prompt, drawn in self.greedy(model):
            ids = torch.tensor([prompt])
            for _ in drawn:
                ids = torch.cat([ids, model.model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            assert ids[0, len(prompt) :].tolist() == drawn

    @pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
    def test_generation_with_a_soft_prompt_equals_that_of_peft(self, architecture: str) -> None:
        model = shake(add_adapter(tiny_language_model(architecture), SOFT))
        for prompt, drawn in self.greedy(model):  # one by one, since peft counts padding as positions
            ids = torch.tensor([prompt])
            expected = model.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=10,
                do_sample=False,
                eos_token_id=None,
            )
            assert expected[0, -10:].tolist() == drawn

    @staticmethod
    def greedy(model: LanguageModel) -> list[tuple[list[int], list[int]]]:
        prompts = ragged(4, 100, shortest=3, longest=12)
        groups = Engine({"m": model}).generate("m", prompts, SamplingParams(max_tokens=10, temperature=0.0))
        return [(prompt, completion.tokens) for prompt, (completion,) in zip(prompts, groups, strict=True)]

    def test_a_soft_prompt_takes_up_context(self) -> None:
        model = add_adapter(tiny_language_model("gpt2"), SOFT)  # GPT-2 has no positions beyond its context
        assert model.context_length == CONTEXT - 5
        prompt = [1] * (model.context_length - 4)
        fits, too_long = Engine({"m": model}).generate("m", [prompt, [*prompt, 1]], SamplingParams(max_tokens=4))
        assert len(fits[0].tokens) == 4
        assert too_long[0].error is not None
        with model.disable_adapter():
            assert model.context_length == CONTEXT

    def test_lora_on_layers_that_are_not_there(self) -> None:
        config = AdapterConfig(kind="lora", target_modules=["no_such_layer"])
        with pytest.raises(ModelError, match=r"policy\.adapter\.kind=lora: .*no_such_layer"):
            add_adapter(tiny_language_model("llama"), config)


class TestSaving:
    @staticmethod
    def reload(model: LanguageModel, directory: Path, **settings: str) -> LanguageModel:
        save_pretrained(model, directory)
        return load_language_model(policy_config(directory, **settings))

    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_and_loading_gives_the_same_model(
        self, adapter: AdapterConfig, model_directory: Directory, tmp_path: Path
    ) -> None:
        start = load_trainable(policy_config(model_directory("llama")), 0)
        model = shake(add_adapter(start, adapter))
        loaded = self.reload(model, tmp_path)
        assert torch.equal(logits(loaded), logits(model))
        assert not trainable(loaded)
        assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
        assert loaded.tokenizer.chat_template == model.tokenizer.chat_template
        assert not (tmp_path / BASE_DIRECTORY).exists()  # the base model stays where it is

    def test_in_bfloat16_and_loading_gives_the_same_model(self, model_directory: Directory, tmp_path: Path) -> None:
        start = load_trainable(policy_config(model_directory("llama"), dtype="bfloat16"), 0)
        model = shake(add_adapter(start, LORA))
        assert torch.equal(logits(self.reload(model, tmp_path, dtype="bfloat16")), logits(model))

    @pytest.mark.parametrize("second", ADAPTERS)
    def test_a_saved_lora_is_merged_before_a_new_adapter_is_added(
        self, second: AdapterConfig, model_directory: Directory, tmp_path: Path
    ) -> None:
        first = shake(add_adapter(load_trainable(policy_config(model_directory("llama")), 0), LORA))
        save_pretrained(first, tmp_path / "first")
        start = load_trainable(policy_config(tmp_path / "first"), 0)
        assert torch.equal(logits(start), logits(first))
        model = add_adapter(start, second)
        with model.disable_adapter():
            assert torch.allclose(logits(model), logits(first), atol=1e-4)
        shake(model, seed=1)
        # The merged weights exist nowhere else, so they are saved with the new adapter and move with the directory.
        save_pretrained(model, tmp_path / "partial")
        (tmp_path / "partial").rename(tmp_path / "second")
        again = load_language_model(policy_config(tmp_path / "second"))
        assert torch.allclose(logits(again), logits(model), atol=1e-5)
        with again.disable_adapter(), model.disable_adapter():
            assert torch.allclose(logits(again), logits(model), atol=1e-5)

    @pytest.mark.parametrize("adapter", ADAPTERS)
    @pytest.mark.parametrize("architecture", ["llama", "qwen2"])
    def test_a_model_from_scratch_is_saved_whole(
        self, adapter: AdapterConfig, architecture: str, model_directory: Directory, tmp_path: Path
    ) -> None:
        start = load_trainable(policy_config(model_directory(architecture), from_scratch=True), 3)
        model = shake(add_adapter(start, adapter))
        assert torch.allclose(logits(self.reload(model, tmp_path)), logits(model), atol=1e-5)

    def test_training_of_a_saved_soft_prompt_continues(self, model_directory: Directory, tmp_path: Path) -> None:
        first = shake(add_adapter(load_trainable(policy_config(model_directory("llama")), 0), SOFT))
        save_pretrained(first, tmp_path / "first")
        model = add_adapter(load_trainable(policy_config(tmp_path / "first"), 0), SOFT)
        assert torch.equal(logits(model), logits(first))
        (name,) = trainable(model)
        assert "prompt_encoder" in name
        logits(model).square().sum().backward()
        assert dict(model.named_parameters())[name].grad is not None
        shake(model, seed=1)
        assert torch.equal(logits(self.reload(model, tmp_path / "second")), logits(model))

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
        model = shake(add_adapter(load_trainable(policy_config(model_directory("llama")), 0), LORA))
        save_pretrained(model, tmp_path)
        base: PreTrainedModel = tiny_transformer("llama")
        read = PeftModel.from_pretrained(base, str(tmp_path)).eval()
        assert torch.allclose(read(input_ids=IDS).logits, logits(model), atol=1e-5)


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
            logits(model).square().sum().backward()
            gradients.append({n: w.grad for n, w in model.named_parameters() if w.requires_grad})
        assert calls == [False, True, True]
        for name, gradient in gradients[0].items():
            assert torch.equal(gradient, gradients[1][name]), name

    def test_keeps_dropout_off_and_generation_unchanged(self) -> None:
        plain, model = tiny_language_model("gpt2"), tiny_language_model("gpt2")  # its dropout is 0.1
        model.enable_gradient_checkpointing()
        assert torch.equal(logits(model.requires_grad_(True)), logits(plain))
        assert not any(module.training for module in model.modules())
        drawn = [Engine({"m": m}).generate("m", [[1, 2, 3]], SamplingParams(max_tokens=8)) for m in (plain, model)]
        assert drawn[0] == drawn[1]

    def test_is_refused_if_layers_apply_their_own_dropout(self) -> None:
        config = OPTConfig(vocab_size=50, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2)
        config.word_embed_proj_dim = 32
        model = LanguageModel(OPTForCausalLM(config), tokenizer("llama"), "m")
        with pytest.raises(ModelError, match=r"dropout=0\.1: set it to 0"):
            model.enable_gradient_checkpointing()


class TestFrozenCopy:
    def test_does_not_change_with_training_and_keeps_ties(self) -> None:
        model = add_adapter(tiny_language_model("qwen2"), FULL)
        copy, before = frozen_copy(model), logits(model).detach()
        shake(model)
        assert torch.equal(logits(copy), before)
        assert not torch.allclose(logits(model), before, atol=0.1)
        assert copy.head.weight.data_ptr() == copy.causal.get_input_embeddings().weight.data_ptr()
        assert not trainable(copy)
        assert trainable(model)

    def test_shares_what_is_not_trained(self) -> None:
        model = shake(add_adapter(tiny_language_model("llama"), SOFT))
        copy, before = frozen_copy(model), logits(model).detach()
        shake(model)
        assert torch.equal(logits(copy), before)
        assert copy.head.shares_storage_with(model.head)
        assert trainable(model)


class TestFingerprint:
    @staticmethod
    def of(weight: Tensor, name: str = "w") -> str:
        return fingerprint([(name, weight)])

    def test_repeats(self, llama: LanguageModel) -> None:
        again = tiny_language_model("llama")
        assert fingerprint(llama.named_parameters()) == fingerprint(again.named_parameters())
        assert fingerprint(llama.named_parameters()) == fingerprint(reversed(list(again.named_parameters())))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_changes_with_the_smallest_change(self, dtype: torch.dtype) -> None:
        weight = torch.arange(12, dtype=dtype).view(3, 4)
        changed = weight.clone()
        changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(100.0, dtype=dtype))
        others = [changed, weight.flip(0), weight.T, weight.reshape(4, 3), -weight, weight.to(torch.float16)]
        prints = {self.of(other) for other in others} | {self.of(weight), self.of(weight, "v")}
        assert len(prints) == 8

    def test_does_not_depend_on_the_layout_in_memory(self) -> None:
        weight = torch.randn(4, 6)
        assert self.of(weight.T.contiguous().T) == self.of(weight)

    def test_takes_scalars_and_empty_weights(self) -> None:
        assert self.of(torch.tensor(1.0)) != self.of(torch.tensor(2.0))
        assert self.of(torch.zeros(0)) != self.of(torch.zeros(0, 2))
