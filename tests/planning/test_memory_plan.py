"""The memory plan matches the memory that the models hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import save_tiny
from tiny_runs import Workshop
from transformers import LlamaConfig, LlamaForSequenceClassification, PretrainedConfig

from alignpro.config import TrainConfig, load_config
from alignpro.errors import ModelError
from alignpro.models.cpu.packed_linear import PackedLinear
from alignpro.models.frozen_layers import replace_frozen_layers
from alignpro.models.loading import load_language_model
from alignpro.planning.memory import ONE_PROCESS, estimate_memory
from alignpro.planning.memory_table import memory_table
from alignpro.planning.model_size import build_empty, measure
from alignpro.policy.policy import Policy
from alignpro.training.critic import ValueModel
from alignpro_kernels import backends


def config(made: Workshop, *overrides: str) -> TrainConfig:
    _, *arguments = made.arguments("train", made.root / "run", *overrides)
    return load_config(TrainConfig, arguments)


@pytest.mark.parametrize("adapter", ["full", "lora", "soft_prompt"])
def test_it_counts_the_weights_that_are_held_and_trained(adapter: str, tmp_path: Path) -> None:
    job = config(Workshop(tmp_path), f"policy.adapter.kind={adapter}", "policy.adapter.virtual_tokens=3")
    policy = Policy.load(job.policy, seed=0)
    trained = sum(weight.numel() for weight in policy.trainable.values())
    held = sum(weight.numel() for weight in policy.module.parameters())
    target = load_language_model(job.target_model)
    need = estimate_memory(job, ONE_PROCESS, ranks=1)
    assert need.training.weights == 4 * held
    assert need.training.gradients == 4 * trained
    assert need.training.optimizer == 8 * trained
    assert need.frozen == 4 * sum(weight.numel() for weight in target.parameters())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_the_layers_of_gpt2_are_linear_too(tmp_path: Path) -> None:
    """Its weights are transposed, in layers of a class of their own."""
    path = save_tiny("gpt2", tmp_path / "gpt2")
    job = config(Workshop(tmp_path), f"policy.path={path}", "policy.adapter.kind=lora")
    policy = Policy.load(job.policy, seed=0)
    trained = [weight.numel() for weight in policy.trainable.values()]
    for setup in (ONE_PROCESS, "z1", "z2", "z3"):
        assert estimate_memory(job, setup, ranks=1).training.gradients > 0
    need = estimate_memory(job, ONE_PROCESS, ranks=1).training
    assert need.gradients == 4 * sum(trained) > 0
    size = measure(build_empty(job.policy), job.policy)
    assert size.linear == 2 * 12 * 32**2, "of each layer: attention 4 · 32², MLP 8 · 32²"
    assert size.packed == 0


@pytest.mark.parametrize(("change", "once"), [("lora", True), ("full", True), ("target", False), ("zero", False)])
def test_a_target_that_the_policy_starts_from_is_held_once_by_one_process(
    change: str, once: bool, tmp_path: Path
) -> None:
    made = Workshop(tmp_path)
    path = made.root / ("target" if change == "target" else "prompter")
    kind = "full" if change == "full" else "lora"
    job = config(made, f"target.path={path}", f"policy.adapter.kind={kind}")
    need = estimate_memory(job, "z1" if change == "zero" else ONE_PROCESS, ranks=1)
    held = sum(weight.numel() for weight in load_language_model(job.target_model).parameters())
    assert need.frozen == (0 if once else 4 * held)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_an_adapter_that_goes_on_training_is_measured_on_its_base_model(tmp_path: Path) -> None:
    made = Workshop(tmp_path)
    assert made.run("sft", tmp_path / "sft", "run.steps=1", "policy.adapter.kind=lora", "policy.adapter.rank=4") == 0
    job = config(made, f"policy.path={tmp_path / 'sft' / 'model'}")
    policy = Policy.load(job.policy, seed=0)
    trained = sum(weight.numel() for weight in policy.trainable.values())
    held = {id(weight): weight.numel() for weight in policy.module.parameters()}
    need = estimate_memory(job, ONE_PROCESS, ranks=1).training
    assert need.weights == 4 * sum(held.values())
    assert need.gradients == 4 * trained
    assert need.optimizer == 8 * trained


def test_each_stage_shards_one_more_kind_of_state(tmp_path: Path) -> None:
    job = config(Workshop(tmp_path), "policy.dtype=bfloat16")
    whole = estimate_memory(job, ONE_PROCESS, 1).training
    needs = [estimate_memory(job, setup, 4).training for setup in ("z1", "z2", "z3")]
    assert [need.optimizer * 4 == whole.optimizer for need in needs] == [True, True, True]
    assert [need.gradients * 4 == whole.gradients for need in needs] == [False, True, True]
    small = needs[2].weights - whole.weights / 4  # small weights, which ZeRO-3 keeps whole
    assert [need.weights == whole.weights for need in needs] == [True, True, False]
    assert 0 < small <= whole.weights
    assert [estimate_memory(job, setup, 4).sampling_copy > 0 for setup in ("z1", "z2", "z3")] == [False, False, True]


@pytest.mark.parametrize("model", ["llama", "qwen2"])  # untied and tied output layer
def test_a_critic_is_counted(model: str, tmp_path: Path) -> None:
    made = Workshop(tmp_path)
    save_tiny(model, tmp_path / "policy", num_hidden_layers=1, tie_word_embeddings=model == "qwen2")
    job = config(made, f"policy.path={tmp_path / 'policy'}", "objective.loss=ppo_clip")
    critic = config(made, f"policy.path={tmp_path / 'policy'}", "objective.loss=ppo_clip", "objective.advantage=gae")
    alone, both = (estimate_memory(each, ONE_PROCESS, 1).training for each in (job, critic))
    model_of_values = ValueModel(Policy.load(critic.policy, seed=0).model)
    held = sum(weight.numel() for weight in model_of_values.parameters())
    trained = sum(weight.numel() for weight in model_of_values.parameters() if weight.requires_grad)
    assert both.weights - alone.weights == 4 * held
    assert both.gradients - alone.gradients == 4 * trained
    assert both.optimizer - alone.optimizer == 8 * trained


def test_a_model_without_a_dimension_asks_for_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = config(Workshop(tmp_path))
    model = build_empty(job.policy)
    monkeypatch.setattr(model.config, "get_text_config", PretrainedConfig)
    with pytest.raises(ModelError, match=r"lacks a dimension: .* set optimizer.micro_batch_size to a number"):
        measure(model, job.policy)


def test_offloaded_states_are_counted_as_host_memory(tmp_path: Path) -> None:
    job = config(Workshop(tmp_path), "policy.dtype=bfloat16")
    for stage in ("z2", "z3"):
        here, there = estimate_memory(job, stage, 4).training, estimate_memory(job, f"{stage}_offload", 4).training
        assert there.host >= here.optimizer > there.optimizer == 0
        assert here.host == 0


def test_buckets_are_counted(tmp_path: Path) -> None:
    made = Workshop(tmp_path)
    for stage, copies in ((1, 1), (2, 2), (3, 2)):  # with overlap, stage 2 fills one bucket while the other is reduced
        zero = {"stage": stage, "overlap_comm": stage == 2, "contiguous_gradients": True}
        peaks = []
        for elements in (1000, 3000):
            path = tmp_path / f"{stage}_{elements}.json"
            path.write_text(json.dumps({"zero_optimization": zero | {"reduce_bucket_size": elements}}))
            peaks.append(estimate_memory(config(made), str(path), 2).update)
        assert peaks[1] - peaks[0] == pytest.approx(copies * 2000 * 4)


def test_the_table_says_what_fits(tmp_path: Path) -> None:
    job = config(Workshop(tmp_path))
    rows = [line.split() for line in memory_table(job, 2, device_bytes=1e12)]
    assert [row[0] for row in rows] == ["set-up", "z0", "z1", "z2", "z3", "z2_offload", "z3_offload"]
    assert {row[-1] for row in rows[1:]} == {"yes"}
    assert memory_table(job, 2, device_bytes=1.0)[-1].endswith("no")
    assert memory_table(job, 1)[1].split()[0] == ONE_PROCESS
    assert memory_table(config(Workshop(tmp_path / "half"), "policy.dtype=bfloat16"), 2)[1].split()[0] == "z1"


def test_the_cache_has_the_configured_size(tmp_path: Path) -> None:
    made = Workshop(tmp_path)
    whole, half = (estimate_memory(config(made, f"rollout.engine.max_batch={n}"), "z1", 1).cache for n in (4, 2))
    assert whole == 2 * half > 0
    assert estimate_memory(config(made, "rollout.engine.pool_bytes=1000000"), "z1", 1).cache == 1_000_000


def test_frozen_models_are_counted_at_their_own_stage(tmp_path: Path) -> None:
    made = Workshop(tmp_path)
    save_tiny("llama", tmp_path / "deep", num_hidden_layers=4)
    deep = f"target.path={tmp_path / 'deep'}"
    whole, parts = (estimate_memory(config(made, deep, f"deepspeed.target_stage={n}"), "z2", 4) for n in (0, 3))
    assert parts.frozen * 4 == whole.frozen > 0
    assert (whole.gathered_frozen, parts.gathered_frozen) == (0, whole.frozen)
    held, offloaded = (
        estimate_memory(config(made, f"deepspeed.offload_reference={on}"), "z2", 4) for on in (False, True)
    )
    assert 0 < held.training.weights - offloaded.training.weights < held.training.weights / 2


@pytest.mark.skipif(backends()["cpp"] is not None, reason="no C++ compiler")
def test_the_packed_layers_of_a_reward_model_are_counted_where_it_is_whole(tmp_path: Path) -> None:
    made = Workshop(tmp_path)
    shape = LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    classifier = LlamaForSequenceClassification(shape).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    replace_frozen_layers(classifier, "classifier")
    packed = sum(each.weight.nbytes for each in classifier.modules() if type(each) is PackedLinear)
    scored = "reward.components=[{kind: model, model: {path: " + str(tmp_path / "classifier") + ", device: cpu}}]"
    without, whole, sharded = (
        estimate_memory(config(made, *settings), "z2", 2).packed_frozen
        for settings in ([], [scored], [scored, "deepspeed.reward_stage=3"])
    )
    assert whole - without == packed > 0 and sharded == without
