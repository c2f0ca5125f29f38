"""Activated LoRA: equal to the base model bit for bit before the invocation, to peft after it, with one set of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import (
    ACTIVATED,
    ARCHITECTURES,
    INVOCATION,
    apply_head,
    gradients,
    logits_by_peft,
    perturb,
    policy_config,
    ragged,
    save_tiny,
    tiny_adapted,
    tiny_language_model,
    tokenizer,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from alignpro.config import AdapterConfig
from alignpro.errors import DataError, ModelError
from alignpro.models.adapters import add_adapter
from alignpro.models.invocation import invocation_start
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model
from alignpro.models.saving import save_pretrained
from alignpro.models.sequences import SequenceBatch
from alignpro.policy.policy import Policy
from alignpro.policy.reference import frozen_copy

TOKENS = tokenizer("llama").encode(INVOCATION, add_special_tokens=False)
BEFORE = [[token + 5 for token in row] for row in ragged(3, 50, shortest=2, longest=20, seed=1)]
"""Tokens before the invocation. None is part of the invocation, and none is 0, whose embedding is zero."""
SHARED = [[*BEFORE[0], *TOKENS, *BEFORE[0], *TOKENS, 5], [*BEFORE[1], *TOKENS], [*TOKENS, *BEFORE[2]]]
"""Prompts: with two invocations, of which the last counts; with no token after it; with no token before it."""
PROMPTS = [SHARED[i] for i in (0, 0, 0, 1, 1, 2)]
COMPLETIONS = [[token + 5 for token in row] for row in ragged(6, 50, longest=12, seed=2)]


def batch(model: LanguageModel) -> SequenceBatch:
    """Return the sequences, with the invocation as encoded by the model's tokenizer."""
    own = list(model.invocation)
    prompts = [[*BEFORE[0], *own, *BEFORE[0], *own, 5], [*BEFORE[1], *own], [*own, *BEFORE[2]]]
    return SequenceBatch.build([prompts[i] for i in (0, 0, 0, 1, 1, 2)], COMPLETIONS)


def packed(model: LanguageModel, sequences: SequenceBatch) -> Tensor:
    """Return the logits of each action, (N, V), from the packed sequences."""
    return apply_head(model, model.action_states(sequences))


def keys_and_values(model: LanguageModel) -> list[Tensor]:
    """Return a list that records the outputs of the key and value projections, (T, …) each."""
    seen: list[Tensor] = []
    for name, module in model.causal.named_modules():
        if name.endswith(("k_proj", "v_proj", "qkv_proj", "c_attn")):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    return seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_logits_equal_those_of_pefts_own_forward_pass(architecture: str) -> None:
    model = tiny_adapted(architecture)
    sequences = batch(model)
    ours, truth = packed(model, sequences), logits_by_peft(model, sequences)
    assert torch.allclose(ours, truth, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert (packed(model, sequences) - truth).abs().max() > 0.1


def test_with_a_lora_on_the_head() -> None:
    model = tiny_adapted(
        adapter=ACTIVATED.model_copy(update={"target_modules": ["q_proj", "lm_head"]}), dtype=torch.float64
    )
    sequences = batch(model)
    truth = logits_by_peft(model, sequences)
    again = LanguageModel(model.model, model.tokenizer, "again")  # its checks run with the trained weights
    for each in (model, again):
        assert torch.allclose(packed(each, sequences), truth, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_gradients_equal_those_of_pefts_rows(architecture: str, checkpointing: bool) -> None:
    model = tiny_adapted(architecture, dtype=torch.float64)
    sequences = batch(model)
    truth = gradients(model, logits_by_peft(model, sequences))
    if checkpointing:
        model.enable_gradient_checkpointing()
    ours = gradients(model, packed(model, sequences))
    for name, gradient in truth.items():
        assert (ours[name] - gradient).norm() <= 2e-6 * gradient.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_the_invocation_keys_and_values_are_the_base_models_bit_for_bit(dtype: torch.dtype) -> None:
    model = tiny_adapted().to(dtype)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.data = weight.data.float()  # peft makes them in float32 also for 16-bit models
    sequences = SequenceBatch.build(PROMPTS, COMPLETIONS)
    seen = keys_and_values(model)
    with torch.no_grad():
        model.action_states(sequences)
        ours, seen[:] = list(seen), []
        with model.disable_adapter():
            model.action_states(sequences)
    active = sequences.pack(0, TOKENS).active
    assert active is not None
    acted = torch.zeros(len(ours[0]), dtype=torch.bool).index_fill(0, active, True)
    assert not acted[: len(SHARED[0]) - 3].any() and acted[len(SHARED[0]) - 3 :][:3].all()
    assert len(ours) == len(seen) == 4
    for own, base in zip(ours, seen, strict=True):
        assert torch.equal(own[~acted], base[~acted])
        assert (own[acted] != base[acted]).any(1).all()


def test_tokens_without_the_adapter_are_unaffected_by_those_with_it() -> None:
    """Even where the base model's own output is not finite."""
    model = tiny_adapted()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    with torch.no_grad():
        weights[0].fill_(torch.nan)
    line = torch.arange(6)
    probe: dict[str, Tensor] = {}
    layer: nn.Module = model.causal.model.layers[0].self_attn.q_proj  # type: ignore[union-attr,index,assignment]
    layer.register_forward_hook(lambda module, inputs, output: probe.update(out=output[0]))
    sequences = SequenceBatch.build([[*line.tolist(), *TOKENS]], [[1, 2]])
    with torch.no_grad():
        model.action_states(sequences)
    assert probe["out"][:6].isfinite().all()
    assert not probe["out"][6:].isfinite().any()


def test_the_last_invocation_counts() -> None:
    assert [invocation_start(prompt, TOKENS) for prompt in SHARED] == [len(SHARED[0]) - 3, len(BEFORE[1]), 0]
    with pytest.raises(DataError, match=r"does not contain the invocation tokens .* chat template"):
        invocation_start([1, 2, TOKENS[0]], TOKENS)
    with pytest.raises(DataError, match="does not contain the invocation tokens"):
        tiny_adapted().action_states(SequenceBatch.build([[1, 2]], [[3]]))


class TestBase:
    """One set of weights serves the model with and without the adapter."""

    @pytest.mark.parametrize("adapter", [ACTIVATED, AdapterConfig(kind="lora", rank=4)], ids=["activated", "plain"])
    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
    def test_is_the_original_model(self, architecture: str, adapter: AdapterConfig) -> None:
        before = tiny_language_model(architecture)
        model = tiny_adapted(architecture, adapter=adapter)
        sequences = SequenceBatch.build(PROMPTS, COMPLETIONS)
        own = batch(model) if adapter.activated else sequences
        states = model.action_states(own)
        base = model.without_adapter()
        assert torch.equal(base.action_states(sequences), before.action_states(sequences))
        assert torch.equal(model.action_states(own), states)
        assert base.shares_weights(model)
        assert not base.shares_weights(before)
        assert base.head.weight is model.head.weight

    def test_ignores_an_adapter_on_the_head(self) -> None:
        adapter = AdapterConfig(kind="lora", rank=4, target_modules=["q_proj", "lm_head"])
        model = tiny_adapted(adapter=adapter)
        assert model.head.lora is not None
        assert model.without_adapter().head.lora is None

    def test_does_not_change_pefts_own_forward_pass(self) -> None:
        ids = torch.tensor([[1, 2, 3, *TOKENS, 4, 5]])
        for adapter in (ACTIVATED, AdapterConfig(kind="lora", rank=4)):
            model = tiny_adapted(adapter=adapter)
            expected = model.model(input_ids=ids).logits
            model.without_adapter().action_states(SequenceBatch.build([[1, 2]], [[3, 4]]))
            assert torch.equal(model.model(input_ids=ids).logits, expected)

    def test_there_is_none_for_a_full_model_or_a_soft_prompt(self) -> None:
        with pytest.raises(ModelError, match="it has no adapter"):
            tiny_language_model("llama").without_adapter()
        with pytest.raises(
            ModelError, match=r"its adapter \(PROMPT_TUNING\) cannot be restricted to a subset of the tokens"
        ):
            add_adapter(tiny_language_model("llama"), AdapterConfig(kind="soft_prompt")).without_adapter()

    @pytest.mark.parametrize(
        "settings",
        [
            {"use_dora": True},
            {"bias": "lora_only"},
            {"target_modules": ["embed_tokens", "q_proj"]},
            {"modules_to_save": ["lm_head"]},
        ],
        ids=lambda settings: next(iter(settings)),
    )
    def test_there_is_none_if_more_than_a_lora_is_trained(self, settings: dict[str, Any]) -> None:
        config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]} | settings)
        wrapped = get_peft_model(tiny_language_model("llama").causal, config)
        model = LanguageModel(wrapped, tokenizer("llama"), "llama")
        with pytest.raises(ModelError, match=r"its adapter \(LORA\) cannot be restricted to a subset of the tokens"):
            model.without_adapter()


class TestFiles:
    """Saved adapters are in peft's format."""

    @pytest.fixture
    def saved(self, tmp_path: Path) -> tuple[LanguageModel, Path]:
        start = load_language_model(policy_config(save_tiny("qwen2", tmp_path / "start"), architecture="qwen2"))
        model = perturb(add_adapter(start, AdapterConfig(kind="lora", rank=4, activated=True)))
        save_pretrained(model, tmp_path / "adapter")
        return model, tmp_path / "adapter"

    def test_peft_reads_it_and_generates_the_same(self, saved: tuple[LanguageModel, Path]) -> None:
        model, path = saved
        assert model.invocation == (257, 261)  # the tokens that open the assistant's turn
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path.parent / "start"), path)
        sequences = SequenceBatch.build([[1, 2, 3, 257, 261]] * 2, [[4, 5, 6], [7, 8]])
        truth = logits_by_peft(LanguageModel(theirs, model.tokenizer, "theirs"), sequences)
        assert torch.allclose(packed(model, sequences), truth, atol=1e-5)

    def test_loading_restores_it(self, saved: tuple[LanguageModel, Path]) -> None:
        model, path = saved
        again = load_language_model(policy_config(path, architecture="qwen2"))
        assert again.invocation == model.invocation
        sequences = SequenceBatch.build([[1, 2, 3, 257, 261]] * 2, [[4, 5, 6], [7, 8]])
        assert torch.equal(again.action_states(sequences), model.action_states(sequences))

    def test_training_can_continue_with_the_loaded_adapter_as_reference(
        self, saved: tuple[LanguageModel, Path]
    ) -> None:
        model, path = saved
        config = policy_config(path, architecture="qwen2", adapter={"kind": "lora", "activated": True})
        policy = Policy.load(config, seed=0)
        assert policy.reference is not None
        assert all(".lora_" in name for name in policy.trainable) and policy.trainable
        sequences = SequenceBatch.build([[1, 2, 3, 257, 261]] * 2, [[4, 5, 6], [7, 8]])
        assert policy.token_stats(sequences).kl.abs().max() == 0
        with torch.no_grad():
            next(w for n, w in policy.trainable.items() if "lora_B" in n).normal_()
        values = policy.token_stats(sequences)
        assert (values.kl.sum(1) > 1e-3).all()
        truth = packed(model, sequences).log_softmax(-1).gather(1, sequences.targets[:, None]).squeeze(1)
        assert torch.allclose(values.reference_logprob, sequences.scatter(truth.detach()), atol=1e-5)

    @pytest.mark.parametrize("adapter", [{"kind": "full"}, {"kind": "lora"}])
    def test_it_cannot_be_merged(self, saved: tuple[LanguageModel, Path], adapter: dict[str, str]) -> None:
        config = policy_config(saved[1], architecture="qwen2", adapter=adapter)
        with pytest.raises(ModelError, match=r"activated LoRA, which cannot be merged.*policy.adapter.activated=true"):
            Policy.load(config, seed=0)


def test_a_policys_reference_is_the_base_and_its_values_are_pefts() -> None:
    policy = Policy(tiny_adapted(), None)
    sequences = SequenceBatch.build(PROMPTS, COMPLETIONS)
    values = policy.token_stats(sequences)
    base = tiny_language_model("llama")
    for given, logits in (
        (values.logprob, logits_by_peft(policy.model, sequences)),
        (values.reference_logprob, packed(base, sequences)),
    ):
        truth = logits.detach().log_softmax(-1).gather(1, sequences.targets[:, None]).squeeze(1)
        assert torch.allclose(given, sequences.scatter(truth), atol=1e-5)


def test_a_frozen_copy_stays_where_it_was() -> None:
    model = tiny_adapted()
    sequences = SequenceBatch.build(PROMPTS, COMPLETIONS)
    copied = frozen_copy(model)
    before = copied.action_states(sequences)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.mul_(2)
    assert torch.equal(copied.action_states(sequences), before)
    assert not torch.equal(model.action_states(sequences), before)


class TestBadInput:
    def test_a_template_that_does_not_open_the_assistants_turn(self) -> None:
        with pytest.raises(
            ModelError, match=r"has no generation prompt with tokens of its own.* policy.adapter.invocation"
        ):
            add_adapter(tiny_language_model("llama"), AdapterConfig(kind="lora", activated=True))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"kind": "full", "activated": True}, "only a LoRA can be activated"),
            ({"kind": "soft_prompt", "activated": True}, "only a LoRA can be activated"),
            ({"kind": "lora", "invocation": "go"}, "needs activated=true"),
            ({"kind": "lora", "activated": True, "invocation": ""}, "needs activated=true"),
        ],
    )
    def test_settings_that_cannot_be_combined(self, settings: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            AdapterConfig.model_validate(settings)

    def test_layers_that_peft_cannot_activate(self) -> None:
        adapter = AdapterConfig(kind="lora", activated=True, invocation="x", target_modules=["embed_tokens"])
        with pytest.raises(ModelError, match=r"variant|on linear layers"):  # raised by peft, or by us after it
            add_adapter(tiny_language_model("llama"), adapter)
