"""The policy's forward passes compared with the model's own logits, computed per sequence without padding or fused heads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel
from tiny_models import (
    ADAPTERS,
    ARCHITECTURES,
    Directory,
    perturb,
    policy_config,
    tiny_language_model,
    tiny_policy,
    tokenizer,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedModel

from alignpro.models.adapters import add_adapter
from alignpro.models.language_model import LanguageModel
from alignpro.models.sequences import SequenceBatch
from alignpro.policy.policy import Policy
from alignpro.policy.reference import frozen_copy
from alignpro.policy.reference_logprobs import sequence_logprob


class Exact(NamedTuple):
    """Exact values of one sequence, (T,) each."""

    logprob: Tensor
    reference_logprob: Tensor
    kl: Tensor
    entropy: Tensor


def exact(policy: Policy, prompt: Sequence[int], completion: Sequence[int]) -> Exact:
    """Compute the values by definition from the logits of peft and transformers; differentiable in the policy."""

    def complete(model: LanguageModel) -> PreTrainedModel | PeftModel:
        return model.model if model.virtual_tokens else model.causal  # peft prepends a soft prompt

    def logits(model: LanguageModel) -> Tensor:
        all_logits = complete(model)(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
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
    for row, (prompt, completion) in enumerate(zip(batch.prompts, batch.completions, strict=True)):
        expected = exact(policy, prompt, completion)
        for name, truth in expected._asdict().items():
            given = getattr(values, name)[row]
            assert torch.allclose(given[: len(completion)], truth, atol=tolerance, rtol=0), (row, name)
            assert not given[len(completion) :].any(), (row, name)


class TestTokenStats:
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
            assert_exact(Policy(perturb(model), reference), batch, 2e-5)

    def test_of_a_reference_of_another_size(self, batch: SequenceBatch) -> None:
        reference = tiny_language_model("llama", hidden_size=16, head_dim=4)
        assert_exact(Policy(tiny_language_model("llama"), reference), batch, 2e-5)

    def test_do_not_depend_on_the_micro_batch(self, batch: SequenceBatch) -> None:
        policy = tiny_policy("mistral", "lora")
        full, part = policy.token_stats(batch), policy.token_stats(batch.rows(2, 5))
        width = part.kl.shape[1]
        for name in Exact._fields:
            assert torch.allclose(getattr(full, name)[2:5, :width], getattr(part, name), atol=1e-5)

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
        rows = [
            exact(policy, prompt, completion)
            for prompt, completion in zip(batch.prompts, batch.completions, strict=True)
        ]
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
        rows = [exact(policy, p, c).logprob.sum() for p, c in zip(batch.prompts, batch.completions, strict=True)]
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
        perturb(policy.model)
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
