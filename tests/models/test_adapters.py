"""Adapters: which weights are trained, and what they compute."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    CONTEXT,
    FULL,
    IDS,
    LORA,
    LORA_HEAD,
    SOFT,
    Directory,
    head_logits,
    perturb,
    policy_config,
    ragged,
    tiny_language_model,
    trainable,
)

from alignpro.config import AdapterConfig
from alignpro.engine import Engine, SamplingParams
from alignpro.errors import ModelError
from alignpro.models.adapters import add_adapter
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_trainable


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

    @pytest.mark.parametrize("adapter", [LORA, LORA_HEAD, SOFT], ids=["lora", "lora on the head", "soft prompt"])
    def test_switched_off_is_the_base_model_to_the_bit(self, adapter: AdapterConfig) -> None:
        base = head_logits(tiny_language_model("llama"))
        model = perturb(add_adapter(tiny_language_model("llama"), adapter))
        names = trainable(model)
        on = head_logits(model)
        assert (on - base).abs().max() > 0.1
        with model.disable_adapter():
            assert torch.equal(head_logits(model), base)
            with model.disable_adapter():
                pass
            assert torch.equal(head_logits(model), base)  # leaving the inner block does not switch it on again
        assert torch.equal(head_logits(model), on)
        assert trainable(model) == names

    def test_switched_off_in_a_frozen_model_stays_frozen(self) -> None:
        model = add_adapter(tiny_language_model("llama"), LORA).requires_grad_(False)
        with model.disable_adapter():
            pass
        assert not trainable(model)

    @pytest.mark.parametrize("adapter", [LORA, LORA_HEAD, SOFT], ids=["lora", "lora on the head", "soft prompt"])
    def test_gives_the_logits_of_pefts_own_forward(self, adapter: AdapterConfig) -> None:
        model = perturb(add_adapter(tiny_language_model("llama"), adapter))
        assert torch.allclose(head_logits(model), model.model(input_ids=IDS).logits[:, -6:], atol=1e-5)

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lora_on_the_head_is_part_of_the_head(self, tied: bool, dtype: torch.dtype) -> None:
        start = tiny_language_model("llama", dtype=dtype, tie_word_embeddings=tied)
        before = start.head.weight.clone()
        model = perturb(add_adapter(start, LORA_HEAD))
        a, b = (dict(model.named_parameters())[f"model.base_model.model.lm_head.lora_{x}.default.weight"] for x in "AB")
        assert torch.allclose(model.head.merged, (before + 2.0 * b @ a).to(model.states_dtype), atol=1e-6)  # α / r = 2
        assert model.head.weight.data_ptr() == start.head.weight.data_ptr()  # the adapter is not merged into the weight
        assert model.head.merged.dtype == model.states_dtype == torch.float32
        expected = model.model(input_ids=IDS).logits.float()
        assert (head_logits(model) - expected).abs().max() < (
            1e-4 if dtype == torch.float32 else 0.02
        ) * expected.abs().max()
        head_logits(model).sum().backward()
        assert a.grad is not None

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_generation_with_a_soft_prompt_is_greedy_in_pefts_own_forward(self, architecture: str) -> None:
        model = perturb(add_adapter(tiny_language_model(architecture), SOFT))
        for prompt, drawn in self.greedy(model):
            ids = torch.tensor([prompt])
            for _ in drawn:
                ids = torch.cat([ids, model.model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            assert ids[0, len(prompt) :].tolist() == drawn

    @pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
    def test_generation_with_a_soft_prompt_equals_that_of_peft(self, architecture: str) -> None:
        model = perturb(add_adapter(tiny_language_model(architecture), SOFT))
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

    def test_a_soft_prompt_that_fills_the_context(self) -> None:
        too_long = AdapterConfig(kind="soft_prompt", virtual_tokens=CONTEXT - 1)
        with pytest.raises(ModelError, match=r"virtual_tokens=127 leaves no room .* its context of 128 tokens"):
            add_adapter(tiny_language_model("llama"), too_long)

    def test_lora_on_layers_that_are_not_there(self) -> None:
        config = AdapterConfig(kind="lora", target_modules=["no_such_layer"])
        with pytest.raises(ModelError, match=r"policy\.adapter\.kind=lora: .*no_such_layer"):
            add_adapter(tiny_language_model("llama"), config)
