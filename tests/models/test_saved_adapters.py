"""Adapters of peft in files: loaded as peft computes them, trained further, merged, and read from any directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tiny_models import (
    IDS,
    LORA,
    Directory,
    apply_head,
    head_logits,
    perturb,
    policy_config,
    save_tiny,
    tokenizer,
    trainable,
)
from transformers import AutoModelForCausalLM

from alignpro.config import AdapterConfig
from alignpro.errors import ModelError
from alignpro.models.adapters import add_adapter, describe_training
from alignpro.models.loading import load_language_model, load_trainable
from alignpro.models.saving import BASE_DIRECTORY, name_base, save_pretrained
from alignpro.models.sequences import SequenceBatch
from alignpro.policy.policy import Policy

KINDS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["embed_tokens"]},
    "trainable tokens": {"trainable_token_indices": {"embed_tokens": [5, 17]}},
    "rank_pattern": {"rank_pattern": {"q_proj": 7}},
    "IA3": {},
}


def save_adapter(base: Path, directory: Path, kind: str = "rsLoRA", **settings: Any) -> PeftModel:
    """Save an adapter of random weights on a saved model, with a tokenizer; returns it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    if kind == "IA3":
        config: Any = IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        )
    else:
        fields = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4} | KINDS[kind] | settings
        config = LoraConfig(task_type="CAUSAL_LM", **fields)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.2 * torch.randn(weight.shape)
    adapted.save_pretrained(str(directory), save_embedding_layers=False)
    tokenizer("llama").save_pretrained(directory)
    return adapted.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


BATCH = SequenceBatch.build([[5, 17, 3], [5, 17, 3]], [[88, 41], [20, 17, 5]])


@pytest.mark.parametrize("kind", KINDS)
class TestKinds:
    def test_goes_on_training_as_it_is(self, kind: str, model_directory: Directory, tmp_path: Path) -> None:
        given = save_adapter(model_directory("llama"), tmp_path / "first", kind)
        policy = Policy.load(policy_config(tmp_path / "first"), seed=0)
        assert torch.allclose(head_logits(policy.model), logits(given), atol=1e-4)
        trained = sum(weight.numel() for weight in policy.trainable.values())
        assert trained == sum(weight.numel() for weight in given.parameters() if weight.requires_grad)
        before = policy.token_stats(BATCH)
        assert before.kl.abs().max() < 1e-5  # its start is the reference
        (-policy.sequence_logprob(BATCH).sum()).backward()
        assert all(weight.grad is not None for weight in policy.trainable.values())
        torch.optim.SGD(policy.trainable.values(), lr=0.1).step()
        policy.model.weights_updated()
        after = policy.token_stats(BATCH)
        assert torch.equal(after.reference_logprob, before.reference_logprob)
        assert after.logprob.sum() > before.logprob.sum()
        save_pretrained(policy.model, tmp_path / "second")
        assert not (tmp_path / "second" / BASE_DIRECTORY).exists()
        again = load_language_model(policy_config(tmp_path / "second"))
        assert torch.allclose(head_logits(again), head_logits(policy.model), atol=1e-5)

    def test_is_merged_for_other_training_or_refused(
        self, kind: str, model_directory: Directory, tmp_path: Path
    ) -> None:
        given = save_adapter(model_directory("llama"), tmp_path, kind)
        start = load_trainable(policy_config(tmp_path), 0)
        if kind == "lora_bias":
            with pytest.raises(ModelError, match=r"cannot be merged into weights: .*bias.*leave policy\.adapter out"):
                add_adapter(start, LORA)
            return
        model = add_adapter(start, AdapterConfig(kind="full"))
        assert torch.allclose(head_logits(model), logits(given), atol=1e-4)
        assert len(trainable(model)) == len(list(model.parameters()))


def test_merging_reaches_weights_that_are_wide_enough_to_be_packed(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base", hidden_size=128, intermediate_size=128)
    given = save_adapter(base, tmp_path / "adapter")
    model = add_adapter(load_trainable(policy_config(tmp_path / "adapter"), 0), AdapterConfig(kind="full"))
    assert torch.allclose(head_logits(model), logits(given), atol=1e-3)


class TestTied:
    @pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
    def test_merging_into_one_leaves_the_other(self, module: str, tmp_path: Path) -> None:
        base = save_tiny("llama", tmp_path / "base", tie_word_embeddings=True)
        given = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", module])
        model = add_adapter(load_trainable(policy_config(tmp_path / "adapter"), 0), AdapterConfig(kind="full"))
        assert torch.allclose(head_logits(model), logits(given), atol=1e-4)
        save_pretrained(model, tmp_path / "merged")
        assert torch.allclose(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(given), atol=1e-4
        )

    def test_they_stay_tied_if_the_adapter_changes_neither(self, tmp_path: Path) -> None:
        base = save_tiny("llama", tmp_path / "base", tie_word_embeddings=True)
        save_adapter(base, tmp_path / "adapter")
        model = add_adapter(load_trainable(policy_config(tmp_path / "adapter"), 0), AdapterConfig(kind="full"))
        assert model.head.weight is model.causal.get_input_embeddings().weight


class TestTrainedPart:
    """What is trained is said, and is the adapter unless the configuration says otherwise."""

    @pytest.mark.parametrize(
        ("adapter", "said"),
        [
            (None, "its adapter (LORA) goes on training: 1,536 weights trained"),
            ("full", "its adapter is merged into its weights, and all weights are trained"),
            ("lora", "its adapter is merged into its weights, and a new adapter (LORA) is trained"),
        ],
    )
    def test_of_a_loras_directory(
        self,
        adapter: str | None,
        said: str,
        model_directory: Directory,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        save_adapter(model_directory("llama"), tmp_path)
        settings = {} if adapter is None else {"adapter": {"kind": adapter}}
        with caplog.at_level("INFO"):
            policy = Policy.load(policy_config(tmp_path, **settings), seed=0)
        (line,) = [record.getMessage() for record in caplog.records if "reference:" in record.getMessage()]
        assert line.startswith(f"{tmp_path}: {said}")
        expected = "the model without its adapter" if adapter == "lora" else "a frozen copy of the start"
        assert line.endswith(f"reference: {expected}")
        assert (policy.reference is None) == (adapter == "lora")
        assert all(".lora_" in name for name in policy.trainable) == (adapter != "full")

    def test_of_a_model(self, model_directory: Directory) -> None:
        start = load_trainable(policy_config(model_directory("llama")), 0)
        assert ": all weights are trained: " in describe_training(start, add_adapter(start, AdapterConfig()))


class TestFromAnyDirectory:
    """A saved model is found by transformers and peft from any working directory, as it is."""

    @staticmethod
    def check(directory: Path, expected: torch.Tensor, *, by_transformers: bool = True) -> None:
        if by_transformers:
            assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(directory)), expected, atol=1e-4)
        named = json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert Path(named).is_absolute()
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), directory)
        assert torch.allclose(logits(model), expected, atol=1e-4)
        assert torch.allclose(head_logits(load_language_model(policy_config(directory))), expected, atol=1e-4)

    @pytest.mark.parametrize("kind", ["lora", None])
    def test_an_adapter_on_a_model_of_a_relative_path(
        self, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        save_adapter(save_tiny("llama", Path("models/base")), Path("sft"))
        adapter = AdapterConfig(kind=kind, rank=4) if kind else AdapterConfig()
        model = perturb(add_adapter(load_trainable(policy_config("sft"), 0), adapter), seed=3)
        save_pretrained(model, Path("run/model"))
        assert Path("run/model", BASE_DIRECTORY).is_dir() == (kind == "lora")
        expected = head_logits(model).detach()
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        self.check(tmp_path / "run" / "model", expected)

    @pytest.mark.parametrize("kind", ["rsLoRA", "DoRA", "modules_to_save", "trainable tokens", "IA3"])
    def test_an_adapter_with_its_base_goes_on_training(self, kind: str, tmp_path: Path) -> None:
        base = save_tiny("llama", tmp_path / "first" / BASE_DIRECTORY)
        written = logits(save_adapter(base, tmp_path / "first", kind))
        # Not all kinds, depending on its version: it looks for their weights under other names than peft writes.
        by_transformers = torch.allclose(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / "first")), written, atol=1e-4
        )
        assert by_transformers or kind not in ("rsLoRA", "IA3")
        model = perturb(add_adapter(load_trainable(policy_config(tmp_path / "first"), 0), AdapterConfig()), seed=3)
        save_pretrained(model, tmp_path / "second")
        (tmp_path / "first").rename(tmp_path / "gone")
        self.check(tmp_path / "second", head_logits(model).detach(), by_transformers=by_transformers)

    def test_an_adapter_on_an_adapter(self, model_directory: Directory, tmp_path: Path) -> None:
        inner = save_adapter(model_directory("llama"), tmp_path / "inner")
        base = inner.merge_and_unload()
        base.save_pretrained(tmp_path / "merged")
        outer = save_adapter(tmp_path / "merged", tmp_path / "outer")
        config = tmp_path / "outer" / "adapter_config.json"
        content = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "inner")}
        config.write_text(json.dumps(content))
        model = load_language_model(policy_config(tmp_path / "outer"))
        assert torch.allclose(head_logits(model), logits(outer), atol=1e-4)
        save_pretrained(model, tmp_path / "saved")
        self.check(tmp_path / "saved", logits(outer))

    def test_a_directory_that_is_written_under_another_name(self, tmp_path: Path) -> None:
        base = save_tiny("llama", tmp_path / "partial" / BASE_DIRECTORY)
        expected = logits(save_adapter(base, tmp_path / "partial"))
        name_base(tmp_path / "partial", tmp_path / "final")
        (tmp_path / "partial").rename(tmp_path / "final")
        self.check(tmp_path / "final", expected)

    def test_the_base_of_a_directory_that_was_moved(self, tmp_path: Path) -> None:
        base = save_tiny("llama", tmp_path / "one" / BASE_DIRECTORY)
        expected = logits(save_adapter(base, tmp_path / "one"))
        (tmp_path / "one").rename(tmp_path / "two")
        assert torch.allclose(head_logits(load_language_model(policy_config(tmp_path / "two"))), expected, atol=1e-4)


def test_training_passes_have_no_dropout(model_directory: Directory, tmp_path: Path) -> None:
    """Importance ratios compare the same function at two sets of weights."""
    save_adapter(model_directory("llama"), tmp_path, lora_dropout=0.5)
    policy = Policy.load(policy_config(tmp_path), seed=0)
    one, two = (policy.sequence_logprob(BATCH) for _ in range(2))
    assert torch.equal(one, two)
    states = policy.model.action_states(BATCH)[:1]
    expected = head_logits(policy.model, torch.tensor([[5, 17, 3]]))[0, -1:]
    assert torch.allclose(apply_head(policy.model, states), expected, atol=1e-4)
