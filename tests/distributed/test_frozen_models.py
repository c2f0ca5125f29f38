"""Sharded target and reward models give the results of whole ones for any division of work, and take a share of the memory."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import assert_close_runs, run_cases, run_to_end, workshop
from tiny_models import ARCHITECTURES, attention, save_tiny, tiny_config, tokenizer
from tiny_runs import read_metrics
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from alignpro.config import ModelConfig
from alignpro.distributed.ranks import Ranks
from alignpro.distributed.sharding.frozen import ShardedModels
from alignpro.engine import Engine, SamplingParams
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model, resolve_dtype

LAYERS = 3
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])
STEP = ["rollout.prompts_per_step=3", "optimizer.learning_rate=0.0005", "run.steps=2", "run.checkpoint_every=2"]
"""Three prompts on two ranks, and only one for evaluation, where one rank then has no work."""
STEP += ["run.eval_every=1", "run.eval_prompts=1"]


def save_models(root: Path) -> tuple[Path, Path]:
    """Save a target and a reward model with several layers."""
    target, reward = root / "target", root / "reward"
    save_tiny("llama", target, num_hidden_layers=LAYERS)
    torch.manual_seed(1)
    config = tiny_config("llama", num_hidden_layers=LAYERS, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(reward)
    tokenizer("llama").save_pretrained(reward)
    return target, reward


def leaves(value: Any) -> list[float]:
    return [leaf for each in value for leaf in leaves(each)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_every_architecture_runs_gathered(device: str, architecture: str, tmp_path: Path) -> None:
    """A single rank holds the only shard. An accelerator gets it from host memory."""
    save_tiny(architecture, tmp_path, num_hidden_layers=LAYERS)
    config = ModelConfig(path=str(tmp_path), device=device, attention=attention(architecture))
    models = ShardedModels(Ranks())
    whole, parts = load_language_model(config), models.load(config, load_language_model)
    assert parts.device == whole.device
    given = [[5, 6, 7, 8], [7, 8]], SamplingParams(max_tokens=6, n=2)
    expected = Engine({"target": whole}).generate("target", *given)
    with models.materialized():
        got = Engine({"target": parts}).generate("target", *given)
    assert sum(weight.numel() for weight in parts.parameters()) == 0
    for one, other in zip(chain.from_iterable(got), chain.from_iterable(expected), strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_sharded_model_has_the_dtype_of_its_device_and_not_of_the_host(stored: torch.dtype, tmp_path: Path) -> None:
    """The device meta stands for an accelerator, where ``dtype: auto`` is what the files are in; it takes no weights."""
    save_tiny("llama", tmp_path, num_hidden_layers=1)
    AutoModelForCausalLM.from_pretrained(tmp_path, dtype=stored).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), dtype="auto", device="meta")
    loaded: list[LanguageModel] = []

    def load(on_host: ModelConfig) -> LanguageModel:
        loaded.append(load_language_model(on_host))
        raise StopIteration

    with pytest.raises(StopIteration):
        ShardedModels(Ranks()).load(config, load)
    assert {weight.dtype for weight in loaded[0].parameters()} == {resolve_dtype(config)} == {stored}
    assert loaded[0].device.type == "cpu"


def test_sharded_models_give_the_results_of_whole_ones(tmp_path: Path) -> None:
    save_models(tmp_path)
    run_to_end(tmp_path, "worker_frozen.py", str(tmp_path))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, told in enumerate(ranks):
        assert told["numbers"] == {"sum": 2.0**41 + 0.5, "max": -3}
        assert leaves(told["got"]) == pytest.approx(leaves(told["expected"]), abs=1e-5), rank
        assert told["between"] == [0] * len(told["between"])
        assert told["layers present"] == LAYERS
    # Each rank holds half, except for the padding of each shard.
    assert ranks[0]["held"] == ranks[1]["held"] == pytest.approx(ranks[0]["whole"] / 2, rel=0.02)
    assert ranks[0]["told"] == "PeerError: rank 1: RuntimeError: the judge is out"
    assert ranks[1]["told"] == "RuntimeError: the judge is out"
    assert ranks[0]["broken pass"] == "PeerError: rank 1: RuntimeError: out of order"
    assert ranks[1]["broken pass"] == "RuntimeError: out of order"
    assert ranks[0]["too big"] == f"PeerError: rank 1: {ranks[1]['too big']}"
    assert ranks[1]["too big"].startswith("TrainingError: big: 0.1 GiB do not fit in memory once gathered")


def test_training_against_sharded_frozen_models(tmp_path: Path) -> None:
    made = workshop(tmp_path)
    target, reward = save_models(tmp_path / "frozen")
    model = "{kind: model, model: {path: " + str(reward) + ", device: cpu}, batch_size: 2}"
    settings = [*STEP, f"target.path={target}", f"reward.components=[{model}]"]
    stages = ["deepspeed.target_stage=3", "deepspeed.reward_stage=3"]
    cases = {
        "whole": ["deepspeed.config=z2", *stages],
        "whole, with a sharded policy": ["deepspeed.config=z3", *stages],
        "reference offloaded": ["deepspeed.config=z1", "deepspeed.offload_reference=true"],
    }
    single = tmp_path / "single"
    assert made.run("train", single, *settings) == 0
    run_cases(tmp_path, [made.arguments("train", tmp_path / name, *settings, *each) for name, each in cases.items()])
    for name in cases:
        assert_close_runs(single, tmp_path / name)


@pytest.mark.slow
def test_refusals_are_kept_with_everything_sharded(tmp_path: Path) -> None:
    """The guard asks the target for responses to unchanged prompts, on each rank for its own, while it is gathered."""
    made = workshop(tmp_path)
    target, _ = save_models(tmp_path / "frozen")
    guard = "reward.guards=[{kind: refusal_kept, penalty: 1}]"
    settings = [*STEP, f"target.path={target}", guard]
    single = tmp_path / "single"
    assert made.run("train", single, *settings) == 0
    assert all("reward/guard/refusal_kept" in row for row in read_metrics(single) if "reward/mean" in row)
    stages = {"policy sharded": [], "policy and target sharded": ["deepspeed.target_stage=3"]}
    cases = [
        made.arguments("train", tmp_path / name, *settings, "deepspeed.config=z3", *each)
        for name, each in stages.items()
    ]
    run_cases(tmp_path, cases)
    for name in stages:
        assert_close_runs(single, tmp_path / name)
