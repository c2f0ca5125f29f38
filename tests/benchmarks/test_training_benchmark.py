"""The training benchmark: sequence lengths are exact, its file is complete, and skipped peers are named."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from alignpro.config import ModelConfig, PromptingConfig
from alignpro.data import Prompt
from alignpro.prompting.prompter_prompt import PrompterTemplate
from alignpro.prompting.target_prompt import TargetTemplate
from alignpro.prompting.tokenization import load_tokenizer
from benchmarks.training.__main__ import app
from benchmarks.training.ours import OurTraining
from benchmarks.training.task import Task, make_task
from benchmarks.workload import BARE, PAPER, QUICK, reshape

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Make tiny models with templates of the paper's lengths."""
    workload = reshape(QUICK, ["meta_prompt=160", "prompt=64", "rewrite=32", "template=48"])
    return make_task(workload, tmp_path_factory.mktemp("task"), steps=2, seed=1)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run the quick workload without peers."""
    file = tmp_path_factory.mktemp("training") / "quick.json"
    app(["--quick", "--peers", "none", "--json", str(file)], standalone_mode=False)
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return json.loads(file.read_text())


def test_recorded_workloads_have_their_documented_lengths() -> None:
    assert (PAPER.prompter_input, PAPER.rewrite, PAPER.target_input, PAPER.response) == (224, 32, 80, 32)
    assert (BARE.prompter_input, BARE.rewrite, BARE.target_input, BARE.response) == (64, 32, 32, 64)
    assert (PAPER.chains, BARE.chains) == (256, 64)


def test_a_rewrite_has_as_many_tokens_for_the_target_as_for_the_prompter(task: Task) -> None:
    config = PromptingConfig(meta_prompt=str(task.directory / "meta_prompt.jinja"))
    prompter = PrompterTemplate(load_tokenizer(ModelConfig(path=str(task.prompter))), config)
    target = TargetTemplate(load_tokenizer(ModelConfig(path=str(task.target))), max_tokens=200)
    for text in task.prompts:
        assert len(prompter.encode(Prompt.from_text(text))) == 160 + 64
    vocabulary = task.workload.prompter.vocabulary
    assert vocabulary == 259
    for start in range(vocabulary):
        rewrite = [(start + i) % vocabulary for i in range(32)]
        given = target.encode(Prompt.from_text(task.prompts[0]), prompter.decode(Prompt.from_text(""), rewrite))
        assert len(given.tokens) == 48 + 32
        assert given.tokens[40:72] == rewrite  # the sampled tokens, between the two parts of the template
    assert all(token >= vocabulary for token in (*prompter.stop_token_ids, *target.stop_token_ids))


def test_all_prompts_differ(task: Task) -> None:
    assert len(set(task.prompts)) == task.steps * task.workload.prompts


def test_a_step_computes_shared_tokens_once(task: Task) -> None:
    w = task.workload
    training = OurTraining(task, CPU)
    training.step(0)  # the engine's first run also probes its models with a token
    step = training.step(1)
    assert step.tokens["decode"] == w.prompts * w.K * (w.rewrite - 1) + w.chains * (w.response - 1)
    packed = w.meta_prompt + w.prompts * (w.prompt + w.K * (w.rewrite - 1))
    assert step.tokens["update"] == packed  # one forward pass of the policy serves credit and update
    assert step.tokens["credit"] == packed  # of the reference


def test_tokens_are_counted_though_the_engine_runs_no_hooks(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed CUDA graph runs the kernels of a pass, and no hook of its modules."""
    training, w = OurTraining(task, CPU), task.workload
    engine, embedding = training._training.engine, training._training.policy.model.causal.get_input_embeddings()
    assert engine.models["policy"].causal.get_input_embeddings() is embedding
    run_chains = engine.run_chains

    def without_hooks(*args: Any, **options: Any) -> Any:
        hooks = dict(embedding._forward_pre_hooks)
        embedding._forward_pre_hooks.clear()
        try:
            return run_chains(*args, **options)
        finally:
            embedding._forward_pre_hooks.update(hooks)

    monkeypatch.setattr(engine, "run_chains", without_hooks)
    tokens = training.step(0).tokens
    packed = w.meta_prompt + w.prompts * (w.prompt + w.K * (w.rewrite - 1))
    assert (tokens["credit"], tokens["update"]) == (packed, packed)
    assert tokens["decode"] >= w.prompts * w.K * (w.rewrite - 1) + w.chains * (w.response - 1)


def test_overrides_reach_the_configuration(task: Task) -> None:
    with pytest.raises(typer.BadParameter, match="estimator"):
        app(["--quick", "--peers", "none", "--json", "/dev/null", "objective.kl.estimator=k9"], standalone_mode=False)


def test_file_has_medians_phases_and_samples(document: Any) -> None:
    ours = document["ours"]
    assert ours["status"] == "measured"
    assert len(ours["samples"]) == document["run"]["steps"] == 2
    assert ours["step_s"] == pytest.approx(sum(sample["step_s"] for sample in ours["samples"]) / 2)
    assert ours["chains_per_s"] == pytest.approx(QUICK.chains / ours["step_s"])
    assert ours["phases"].keys() == {"rollout", "reward", "credit", "update"}
    assert sum(ours["samples"][0]["phases"].values()) <= ours["samples"][0]["step_s"]
    assert document["run"]["command"].startswith("python -m benchmarks.training")
    assert document["ratio"] is None


def test_a_peer_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)  # makes the import fail, as if TRL were not installed
    file = tmp_path / "quick.json"
    app(["--quick", "--steps", "1", "--warmup", "1", "--json", str(file)], standalone_mode=False)
    document = json.loads(file.read_text())
    assert document["trl"]["status"] == "skipped"
    assert "pip install" in document["trl"]["reason"]
    assert document["ours"]["status"] == "measured"
    assert document["ratio"] is None


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_trl_does_the_same_work_without_sharing(tmp_path: Path) -> None:
    file = tmp_path / "quick.json"
    app(["--quick", "--steps", "1", "--warmup", "1", "--peers", "trl", "--json", str(file)], standalone_mode=False)
    document = json.loads(file.read_text())
    w, tokens, trl = QUICK, document["trl"]["tokens"], document["trl"]
    rewrites = w.prompts * w.K
    assert tokens["prefill"] == rewrites * w.prompter_input + w.chains * w.target_input
    assert tokens["decode"] == rewrites * (w.rewrite - 1) + w.chains * (w.response - 1)
    assert tokens["update"] == tokens["credit"] == rewrites * (w.prompter_input + w.rewrite)
    assert sum(trl["phases"].values()) == pytest.approx(trl["step_s"])
    assert document["ratio"] == pytest.approx(document["ours"]["chains_per_s"] / trl["chains_per_s"])


@pytest.mark.parametrize("change", ["K=0", "K", "layers=3", "target=6", "target=6x13", "response=many"])
def test_an_impossible_shape_is_refused(change: str) -> None:
    with pytest.raises(typer.BadParameter, match=change.partition("=")[2] or change):
        app(["--quick", "--shape", change], standalone_mode=False)
