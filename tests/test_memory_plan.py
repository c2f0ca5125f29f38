"""The memory plan counts what the models really hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import save_tiny
from tiny_runs import Workshop

from alignpro.config import TrainConfig, load_config
from alignpro.memory_plan import memory_need, memory_table
from alignpro.models import load_language_model
from alignpro.policy import Policy


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
    need = memory_need(job, stage=0, ranks=1)
    assert need.weights == 4 * held
    assert need.gradients == 4 * trained
    assert need.optimizer == 8 * trained
    assert need.frozen == 4 * sum(weight.numel() for weight in target.parameters())


def test_stages_shard_one_thing_after_another(tmp_path: Path) -> None:
    job = config(Workshop(tmp_path), "policy.dtype=bfloat16")
    whole, *needs = (memory_need(job, stage, 4) for stage in range(4))
    assert [need.optimizer * 4 == whole.optimizer for need in needs] == [True, True, True]
    assert [need.gradients * 4 == whole.gradients for need in needs] == [False, True, True]
    assert [need.weights * 4 == whole.weights for need in needs] == [False, False, True]
    assert [need.sampling_copy > 0 for need in needs] == [False, False, True]
    assert [line.split()[-1] for line in memory_table(job, 4, device_bytes=1e12)] == [
        "fits",
        "yes",
        "yes",
        "yes",
        "yes",
    ]
    assert memory_table(job, 4, device_bytes=1.0)[-1].endswith("no")


def test_the_cache_is_what_the_configuration_gives_it(tmp_path: Path) -> None:
    made = Workshop(tmp_path)
    whole, half = (memory_need(config(made, f"rollout.engine.max_batch={n}"), 0, 1).cache for n in (64, 32))
    assert whole == 2 * half > 0
    assert memory_need(config(made, "rollout.engine.pool_bytes=1000000"), 0, 1).cache == 1_000_000


def test_frozen_models_are_counted_at_their_own_stage(tmp_path: Path) -> None:
    made = Workshop(tmp_path)
    save_tiny("llama", tmp_path / "deep", num_hidden_layers=4)
    deep = f"target.path={tmp_path / 'deep'}"
    whole, parts = (memory_need(config(made, deep, f"deepspeed.target_stage={n}"), 2, 4) for n in (0, 3))
    assert parts.frozen * 4 == whole.frozen > 0
    assert (whole.sampling_copy, parts.sampling_copy) == (0, whole.frozen)
    layers = memory_need(config(made, deep, "deepspeed.target_stage=3", "deepspeed.gathered_bytes=1"), 2, 4)
    target = load_language_model(config(made, deep).target_model)
    layer = sum(weight.nbytes for weight in target.causal.base_model.layers[0].parameters())
    assert layers.sampling_copy == whole.frozen - 2 * layer  # two of its four are there at a time
    held, offloaded = (memory_need(config(made, f"deepspeed.offload_reference={on}"), 2, 4) for on in (False, True))
    assert 0 < held.weights - offloaded.weights < held.weights / 2
