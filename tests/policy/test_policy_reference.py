"""The reference: which model it is, that it does not change, and its fingerprint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import (
    ADAPTERS,
    FULL,
    SOFT,
    Directory,
    head_logits,
    perturb,
    policy_config,
    save_tiny,
    tiny_language_model,
    tiny_policy,
    tiny_transformer,
    tokenizer,
    trainable,
)
from torch import Tensor

from alignpro.errors import ModelError
from alignpro.models.adapters import add_adapter
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_trainable
from alignpro.models.saving import save_pretrained
from alignpro.models.sequences import SequenceBatch
from alignpro.policy.policy import Policy
from alignpro.policy.reference import fingerprint, frozen_copy
from alignpro.policy.reference_logprobs import sequence_logprob


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
        sft = perturb(add_adapter(start, ADAPTERS["lora"])).eval()
        save_pretrained(sft, tmp_path)
        policy = Policy.load(policy_config(tmp_path, adapter={"kind": kind}), seed=0)
        values = policy.token_stats(batch)
        assert torch.allclose(values.reference_logprob.sum(1), sequence_logprob(sft, batch, 1.0), atol=1e-3)
        assert values.kl.abs().max() < 1e-5

    def test_of_a_policy_that_starts_from_a_soft_prompt_includes_it(
        self, model_directory: Directory, tmp_path: Path, batch: SequenceBatch
    ) -> None:
        start = load_trainable(policy_config(model_directory("llama")), 0)
        sft = perturb(add_adapter(start, ADAPTERS["soft prompt"])).eval()
        save_pretrained(sft, tmp_path)
        policy = Policy.load(policy_config(tmp_path, adapter={"kind": "soft_prompt"}), seed=0)
        assert policy.token_stats(batch).kl.abs().max() == 0
        assert policy.reference is not None
        assert policy.reference.head.shares_storage_with(policy.model.head)  # the base model is in memory once
        expected = sequence_logprob(sft, batch, 1.0)
        perturb(policy.model)
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


class TestFrozenCopy:
    def test_does_not_change_with_training_and_keeps_ties(self) -> None:
        model = add_adapter(tiny_language_model("qwen2"), FULL)
        copy, before = frozen_copy(model), head_logits(model).detach()
        perturb(model)
        assert torch.equal(head_logits(copy), before)
        assert not torch.allclose(head_logits(model), before, atol=0.1)
        assert copy.head.weight.data_ptr() == copy.causal.get_input_embeddings().weight.data_ptr()
        assert not trainable(copy)
        assert trainable(model)

    def test_shares_what_is_not_trained(self) -> None:
        model = perturb(add_adapter(tiny_language_model("llama"), SOFT))
        copy, before = frozen_copy(model), head_logits(model).detach()
        perturb(model)
        assert torch.equal(head_logits(copy), before)
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
