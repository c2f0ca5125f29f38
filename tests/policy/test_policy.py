"""The policy's forward passes compared with the model's own logits, computed per sequence without padding or fused heads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel
from tiny_models import (
    ARCHITECTURES,
    policy_config,
    ragged,
    save_tiny,
    tiny_language_model,
    tiny_transformer,
    tokenizer,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedModel

from alignpro.config import AdapterConfig
from alignpro.errors import ModelError
from alignpro.models.adapters import add_adapter
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_trainable
from alignpro.models.saving import save_pretrained
from alignpro.models.sequences import SequenceBatch
from alignpro.policy.policy import Policy
from alignpro.policy.reference import frozen_copy
from alignpro.policy.reference_logprobs import sequence_logprob

Directory = Callable[[str], Path]

PROMPTS = ragged(6, 100, longest=12, seed=1)
COMPLETIONS = ragged(6, 100, longest=9, seed=2)
ADAPTERS = {
    "full": AdapterConfig(),
    "lora": AdapterConfig(kind="lora", rank=4),
    "lora on the head": AdapterConfig(kind="lora", rank=4, target_modules=["q_proj", "c_attn", "lm_head"]),
    "soft prompt": AdapterConfig(kind="soft_prompt", virtual_tokens=4),
}


def shake(model: LanguageModel, size: float = 0.2) -> LanguageModel:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += size * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)
    return model


def tiny_policy(
    architecture: str, adapter: str, *, temperature: float = 1.0, dtype: torch.dtype = torch.float32, drift: float = 0.2
) -> Policy:
    """Return a policy that differs from its reference."""
    model = add_adapter(tiny_language_model(architecture, dtype=dtype), ADAPTERS[adapter]).to(dtype)
    reference = frozen_copy(model) if adapter == "full" else None
    return Policy(shake(model, drift), reference, temperature=temperature)


class Exact(NamedTuple):
    """Exact values of one sequence, (T,) each."""

    logprob: Tensor
    reference_logprob: Tensor
    kl: Tensor
    entropy: Tensor


def exact(policy: Policy, prompt: list[int], completion: list[int]) -> Exact:
    """Compute the values by definition from the logits of peft and transformers; differentiable in the policy."""

    def whole(model: LanguageModel) -> PreTrainedModel | PeftModel:
        return model.model if model.virtual_tokens else model.causal  # peft prepends a soft prompt

    def logits(model: LanguageModel) -> Tensor:
        all_logits = whole(model)(input_ids=torch.tensor([prompt + completion])).logits[0]
        return all_logits[-len(completion) - 1 : -1] / policy.temperature  # (T, V)

    logp = logits(policy.model).log_softmax(-1)
    with torch.no_grad(), policy.model.disable_adapter() if policy.reference is None else nullcontext():
        logq = logits(policy.reference or policy.model).log_softmax(-1)
    taken = torch.tensor(completion)[:, None]
    p = logp.exp()
    return Exact(
        logp.gather(1, taken).squeeze(1),
        logq.gather(1, taken).squeeze(1),
        (p * (logp - logq)).sum(1),
        -(p * logp).sum(1),
    )


def assert_exact(policy: Policy, batch: SequenceBatch, tolerance: float) -> None:
    values = policy.token_stats(batch)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        expected = exact(policy, prompt, completion)
        for name, truth in expected._asdict().items():
            given = getattr(values, name)[row]
            assert torch.allclose(given[: len(completion)], truth, atol=tolerance, rtol=0), (row, name)
            assert not given[len(completion) :].any(), (row, name)


@pytest.fixture(scope="module")
def batch() -> SequenceBatch:
    return SequenceBatch.build(PROMPTS, COMPLETIONS)


class TestTokenValues:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_equal_those_of_the_models_logits(self, architecture: str, batch: SequenceBatch) -> None:
        assert_exact(tiny_policy(architecture, "full"), batch, 2e-5)

    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_with_every_adapter_and_temperature(self, adapter: str, temperature: float, batch: SequenceBatch) -> None:
        policy = tiny_policy("gpt2", adapter, temperature=temperature, dtype=torch.float64)
        assert_exact(policy, batch, 1e-10)
        assert policy.token_stats(batch).kl.sum() > 0.1

    def test_with_a_bias_and_an_untied_head(self, batch: SequenceBatch) -> None:
        torch.manual_seed(0)
        config = PhiConfig(
            vocab_size=103, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        start = PhiForCausalLM(config).eval()
        with torch.no_grad():
            start.lm_head.bias.normal_()
        for adapter in ("full", "lora"):
            model = add_adapter(LanguageModel(copy.deepcopy(start), tokenizer("llama"), "phi"), ADAPTERS[adapter])
            reference = frozen_copy(model) if adapter == "full" else None
            assert model.head.bias is not None
            assert_exact(Policy(shake(model), reference), batch, 2e-5)

    def test_of_a_reference_of_another_size(self, batch: SequenceBatch) -> None:
        reference = tiny_language_model("llama", hidden_size=16, head_dim=4)
        assert_exact(Policy(tiny_language_model("llama"), reference), batch, 2e-5)

    def test_do_not_depend_on_the_micro_batch(self, batch: SequenceBatch) -> None:
        policy = tiny_policy("mistral", "lora")
        whole, part = policy.token_stats(batch), policy.token_stats(batch.rows(2, 5))
        width = part.kl.shape[1]
        for name in Exact._fields:
            assert torch.allclose(getattr(whole, name)[2:5, :width], getattr(part, name), atol=1e-5)

    def test_of_sequences_without_actions_are_empty(self) -> None:
        values = tiny_policy("llama", "lora").token_stats(SequenceBatch.build([[1, 2], [3]], [[], []]))
        assert values.logprob.tolist() == [[0.0], [0.0]]

    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_kl_is_zero_if_policy_and_reference_are_equal(self, adapter: str, batch: SequenceBatch) -> None:
        policy = tiny_policy("qwen2", adapter, drift=0.0)
        values = policy.token_stats(batch)
        if adapter == "soft prompt":  # any soft prompt differs from none
            assert values.kl.sum() > 0
        else:
            assert values.kl.abs().max() < 1e-6
            assert torch.allclose(values.logprob, values.reference_logprob, atol=1e-6)


class TestGradients:
    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_of_the_fused_loss_equal_those_of_autograd(
        self, adapter: str, temperature: float, batch: SequenceBatch
    ) -> None:
        policy = tiny_policy("gpt2", adapter, temperature=temperature, dtype=torch.float64)
        count = int(batch.mask.sum())
        generator = torch.Generator().manual_seed(3)
        alpha, eta, kappa = torch.randn(3, count, generator=generator, dtype=torch.float64)

        def coefficients(logprob: Tensor, entropy: Tensor, kl: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
            terms = alpha[rows] * logprob + eta[rows] * entropy + kappa[rows] * kl
            return terms, alpha[rows], eta[rows], kappa[rows]

        states = policy.token_stats(batch).reference_states
        output = policy.loss(batch, coefficients, reference_states=states, entropy=True)
        output.loss.backward()
        gradients = {name: weight.grad for name, weight in policy.trainable.items()}
        policy.model.zero_grad()
        rows = [exact(policy, prompt, completion) for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
        logprob, _, kl, entropy = (torch.cat(parts) for parts in zip(*rows, strict=True))
        expected = (alpha * logprob + eta * entropy + kappa * kl).sum()
        expected.backward()
        assert output.loss.item() == pytest.approx(expected.item(), abs=1e-10)
        for name, weight in policy.trainable.items():
            given, truth = gradients[name], weight.grad
            assert given is not None and truth is not None, name
            assert torch.allclose(given, truth, atol=1e-10), name
        if policy.reference is not None:
            assert all(weight.grad is None for weight in policy.reference.parameters())

    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_of_a_sequences_logprob_equal_those_of_autograd(self, adapter: str, batch: SequenceBatch) -> None:
        policy = tiny_policy("gpt2", adapter, temperature=0.8, dtype=torch.float64)
        total = policy.sequence_logprob(batch)
        weights = torch.arange(1.0, 7.0, dtype=torch.float64)
        (weights * total).sum().backward()
        gradients = {name: weight.grad for name, weight in policy.trainable.items()}
        policy.model.zero_grad()
        rows = [exact(policy, p, c).logprob.sum() for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        assert torch.allclose(total, torch.stack(rows), atol=1e-10)
        (weights * torch.stack(rows)).sum().backward()
        for name, weight in policy.trainable.items():
            assert torch.allclose(gradients[name], weight.grad, atol=1e-10), name

    def test_flow_only_into_the_trained_weights(self, batch: SequenceBatch) -> None:
        policy = tiny_policy("llama", "lora")
        policy.sequence_logprob(batch).sum().backward()
        touched = {name for name, weight in policy.model.named_parameters() if weight.grad is not None}
        assert touched == set(policy.trainable)

    def test_of_one_model_need_no_reference(self, batch: SequenceBatch) -> None:
        model = tiny_language_model("gpt2", dtype=torch.float64)
        values = Policy(model, model, temperature=0.7).token_stats(batch).logprob.sum(1)
        assert torch.allclose(sequence_logprob(model, batch, 0.7), values, atol=1e-12)


class TestReference:
    @pytest.mark.parametrize("architecture", ["qwen2", "llama"], ids=["tied", "untied"])
    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_does_not_change_while_the_policy_is_trained(
        self, adapter: str, architecture: str, batch: SequenceBatch
    ) -> None:
        policy = tiny_policy(architecture, adapter, drift=0.0)
        before = policy.token_stats(batch)
        optimizer = torch.optim.AdamW(policy.trainable.values(), lr=0.05)
        (-policy.sequence_logprob(batch).sum()).backward()
        optimizer.step()
        after = policy.token_stats(batch)
        assert torch.equal(after.reference_logprob, before.reference_logprob)
        assert after.logprob.sum() > before.logprob.sum() + 1
        if adapter != "soft prompt":  # which differs from its reference from the start
            assert before.kl.sum() < 1e-5
        assert ((after.kl - before.kl).abs().sum(1) > 1e-3).all()

    def test_is_the_adapter_off_unless_all_weights_are_trained(self, model_directory: Directory) -> None:
        def load(kind: str) -> Policy:
            return Policy.load(policy_config(model_directory("llama"), adapter={"kind": kind}), seed=0)

        assert load("lora").reference is None
        assert load("soft_prompt").reference is None
        assert load("full").reference is not None

    def test_may_be_another_model(self, model_directory: Directory, tmp_path: Path, batch: SequenceBatch) -> None:
        other = save_tiny("llama", tmp_path, seed=5)
        config = policy_config(model_directory("llama"), reference=str(other), adapter={"kind": "lora"})
        values = Policy.load(config, seed=0).token_stats(batch)
        expected = sequence_logprob(tiny_language_model("llama", seed=5), batch, 1.0)
        assert torch.allclose(values.reference_logprob.sum(1), expected, atol=1e-4)
        assert (values.kl.sum(1) > 0.1).all()

    def test_equal_to_the_policys_start_is_not_loaded_twice(self, model_directory: Directory) -> None:
        path = str(model_directory("llama"))
        assert Policy.load(policy_config(path, reference=path, adapter={"kind": "lora"}), seed=0).reference is None

    def test_of_another_vocabulary_is_refused(self, model_directory: Directory) -> None:
        config = policy_config(model_directory("llama"), reference=str(model_directory("qwen2")))
        with pytest.raises(ModelError, match=r"262 vocabulary entries, policy .* has 103"):
            Policy.load(config, seed=0)

    def test_with_another_cap_on_its_logits_is_refused(self, model_directory: Directory) -> None:
        """The exact KL computes both distributions with one soft cap."""
        reference = str(model_directory("gemma2"))
        config = policy_config(model_directory("llama"), reference=reference, attention="eager")
        with pytest.raises(ModelError, match=r"has final_logit_softcapping=3.0, policy .* None"):
            Policy.load(config, seed=0)

    @pytest.mark.parametrize("kind", ["full", "lora"])
    def test_of_a_policy_that_starts_from_a_lora_includes_it(
        self, kind: str, model_directory: Directory, tmp_path: Path, batch: SequenceBatch
    ) -> None:
        start = load_trainable(policy_config(model_directory("llama")), 0)
        sft = shake(add_adapter(start, ADAPTERS["lora"])).eval()
        save_pretrained(sft, tmp_path)
        policy = Policy.load(policy_config(tmp_path, adapter={"kind": kind}), seed=0)
        values = policy.token_stats(batch)
        assert torch.allclose(values.reference_logprob.sum(1), sequence_logprob(sft, batch, 1.0), atol=1e-3)
        assert values.kl.abs().max() < 1e-5

    def test_of_a_policy_that_starts_from_a_soft_prompt_includes_it(
        self, model_directory: Directory, tmp_path: Path, batch: SequenceBatch
    ) -> None:
        start = load_trainable(policy_config(model_directory("llama")), 0)
        sft = shake(add_adapter(start, ADAPTERS["soft prompt"])).eval()
        save_pretrained(sft, tmp_path)
        policy = Policy.load(policy_config(tmp_path, adapter={"kind": "soft_prompt"}), seed=0)
        assert policy.token_stats(batch).kl.abs().max() == 0
        assert policy.reference is not None
        assert policy.reference.head.shares_storage_with(policy.model.head)  # the base model is in memory once
        expected = sequence_logprob(sft, batch, 1.0)
        shake(policy.model)
        values = policy.token_stats(batch)
        assert torch.allclose(values.reference_logprob.sum(1), expected, atol=1e-4)
        assert (values.kl.sum(1) > 1e-3).all()


class TestReferenceId:
    @staticmethod
    def of(path: Path, kind: str, **settings: object) -> str:
        return Policy.load(policy_config(path, adapter={"kind": kind}, **settings), seed=0).reference_id()

    @pytest.mark.parametrize("kind", ["full", "lora", "soft_prompt"])
    def test_depends_on_the_weights(self, kind: str, model_directory: Directory, tmp_path: Path) -> None:
        one = self.of(model_directory("llama"), kind)
        assert self.of(model_directory("llama"), kind) == one
        changed = tiny_transformer("llama")
        with torch.no_grad():
            changed.model.layers[1].mlp.up_proj.weight[[0, 1]] = changed.model.layers[1].mlp.up_proj.weight[[1, 0]]
        changed.save_pretrained(tmp_path)
        tokenizer("llama").save_pretrained(tmp_path)
        assert self.of(tmp_path, kind) != one

    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_does_not_change_with_training(self, adapter: str) -> None:
        fresh, trained = tiny_policy("llama", adapter, drift=0.0), tiny_policy("llama", adapter)
        assert fresh.reference_id() == trained.reference_id()


class TestLoad:
    @pytest.mark.parametrize("kind", ["full", "lora", "soft_prompt"])
    def test_gradient_checkpointing_gives_equal_gradients(
        self, kind: str, model_directory: Directory, batch: SequenceBatch
    ) -> None:
        gradients = []
        for checkpointing in (False, True):
            config = policy_config(
                model_directory("gpt2"), adapter={"kind": kind}, gradient_checkpointing=checkpointing
            )
            policy = Policy.load(config, seed=0)
            policy.sequence_logprob(batch).sum().backward()
            gradients.append([weight.grad for weight in policy.trainable.values()])
        for plain, again in zip(*gradients, strict=True):
            assert torch.equal(plain, again)

    def test_has_no_dropout(self, model_directory: Directory, batch: SequenceBatch) -> None:
        config = policy_config(model_directory("gpt2"), adapter={"kind": "lora", "dropout": 0.5})
        policy = Policy.load(config, seed=0)
        shake(policy.model)
        assert torch.equal(policy.sequence_logprob(batch), policy.sequence_logprob(batch))

    def test_draws_an_adapter_from_the_seed(self, model_directory: Directory) -> None:
        config = policy_config(model_directory("llama"), adapter={"kind": "lora"})
        one, same, other = (Policy.load(config, seed=seed).trainable for seed in (1, 1, 2))
        assert all(torch.equal(weight, same[name]) for name, weight in one.items())
        assert not all(torch.equal(weight, other[name]) for name, weight in one.items())

    def test_in_bfloat16_computes_the_kl_of_the_sampled_distribution(
        self, model_directory: Directory, batch: SequenceBatch
    ) -> None:
        policy = Policy.load(policy_config(model_directory("llama"), dtype="bfloat16"), seed=0)
        values = policy.token_stats(batch)
        assert values.logprob.dtype == torch.float32
        assert values.kl.abs().max() == 0
        precise = Policy.load(policy_config(model_directory("llama")), seed=0).token_stats(batch)
        assert (values.logprob - precise.logprob).abs().max() < 0.2


def test_a_vocabulary_larger_than_the_tokenizers_is_accepted(batch: SequenceBatch) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LanguageModel(LlamaForCausalLM(config), tokenizer("llama"), "padded")
    assert_exact(Policy(model, frozen_copy(model)), batch, 1e-5)
