"""Self mode: the prompter is a LoRA on the target itself, whose weights are in memory once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_models import policy_config
from tiny_runs import Workshop, read_metrics
from transformers import AutoModelForCausalLM

from alignpro.config import EvalConfig, OptimalConfig, TrainConfig, load_config, validate_config
from alignpro.engine import Engine, SamplingParams
from alignpro.environments.rewriter import Rewriter
from alignpro.evaluation.evaluate import evaluate
from alignpro.evaluation.optimal import optimal
from alignpro.models.loading import load_language_model
from alignpro.models.sequences import SequenceBatch
from alignpro.training.builders import prompter_training

Finished = Callable[..., Path]
ACTIVATED = ("policy.adapter.kind=lora", "policy.adapter.rank=4", "policy.adapter.activated=true")
SELF = (*ACTIVATED, "target=policy")


def test_a_run_trains_and_exports_an_adapter_that_peft_loads(workshop: Workshop, finished: Finished) -> None:
    out = finished("train", *SELF)
    metrics = read_metrics(out)
    assert abs(metrics[0]["kl"]) < 1e-6  # passes with and without gradients round differently
    assert metrics[-2]["kl"] > 1e-5
    ours = load_language_model(policy_config(out / "model", architecture="qwen2"))
    assert ours.invocation
    start = AutoModelForCausalLM.from_pretrained(workshop.root / "prompter")
    theirs = PeftModel.from_pretrained(start, out / "model").eval()
    prompt = [7, 8, 9, *ours.invocation]
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    (completion,) = Engine({"m": ours}).generate("m", [prompt], greedy)[0]
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    truth = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    assert truth[0, len(prompt) :].tolist() == completion.tokens


@pytest.mark.parametrize("adapter", [ACTIVATED, ACTIVATED[:2]], ids=["activated", "plain"])
def test_a_run_equals_one_with_a_separate_target(
    workshop: Workshop, finished: Finished, adapter: tuple[str, ...]
) -> None:
    shared = finished("train", *adapter, "target=policy")
    apart = finished("train", *adapter, f"target.path={workshop.root}/prompter")
    for one, other in zip(read_metrics(shared), read_metrics(apart), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_it_continues_from_supervised_fine_tuning(workshop: Workshop, finished: Finished, tmp_path: Path) -> None:
    sft = finished("sft", *ACTIVATED) / "model"
    assert workshop.run("train", tmp_path / "run", *SELF, f"policy.path={sft}") == 0
    metrics = read_metrics(tmp_path / "run")
    assert abs(metrics[0]["kl"]) < 1e-6  # relative to ρ_sft, which has the loaded adapter
    assert metrics[-2]["kl"] > 1e-5
    config = load_config(TrainConfig, workshop.arguments("train", tmp_path, *SELF, f"policy.path={sft}")[1:])
    target = prompter_training(config).engine.models["target"]
    start = load_language_model(policy_config(workshop.root / "prompter", architecture="qwen2"))
    batch = SequenceBatch.build([[1, 2, 3]], [[4, 5]])
    assert torch.equal(target.action_states(batch), start.action_states(batch))


def test_weights_are_in_memory_once(workshop: Workshop, tmp_path: Path) -> None:
    config = load_config(TrainConfig, workshop.arguments("train", tmp_path, *SELF)[1:])
    training = prompter_training(config)
    policy, target = training.engine.models["policy"], training.engine.models["target"]
    assert target.shares_weights(policy)
    assert {id(weight) for weight in target.parameters()} == {id(weight) for weight in policy.parameters()}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_separate_target_shares_equal_frozen_weights(workshop: Workshop, tmp_path: Path, kind: str) -> None:
    """They are those of the policy under a LoRA, or of the reference of a policy that is trained whole."""
    overrides = [f"policy.adapter.kind={kind}", f"target.path={workshop.root}/prompter", f"run.out={tmp_path}"]
    training = prompter_training(load_config(TrainConfig, workshop.arguments("train", tmp_path, *overrides)[1:]))
    target, policy = training.engine.models["target"], training.policy
    frozen = policy.model if policy.reference is None else policy.reference
    held = [{w.data_ptr() for w in model.parameters()} for model in (target, frozen, policy.model)]
    assert (
        held[0] <= held[1]
        and (held[0] <= held[2]) == (kind == "lora")
        and (held[0] & held[2] == set()) == (kind == "full")
    )
    before = {name: weight.clone() for name, weight in target.named_parameters()}
    training.step(0)
    assert all(torch.equal(weight, before[name]) for name, weight in target.named_parameters())


def test_the_runs_target_answers_its_rewrites(workshop: Workshop, finished: Finished) -> None:
    texts = ["flip the word stone pls", "sort these letters: dcba"]
    shared = Rewriter.load(finished("train", *SELF), with_target=True)
    apart = Rewriter.load(finished("train", *ACTIVATED, f"target.path={workshop.root}/prompter"), with_target=True)
    rewritten = shared.rewrite(texts)
    assert rewritten == apart.rewrite(texts)
    assert all(group[0].response is not None for group in rewritten)


def test_it_is_evaluated_with_one_set_of_weights(workshop: Workshop, finished: Finished, tmp_path: Path) -> None:
    """Arms and log-probabilities equal those with a separate target."""
    model = {"device": "cpu"}
    common = {
        "seed": 1,
        "data": {"source": str(workshop.root / "prompts.jsonl"), "holdout": 0.5},
        "reward": {"components": [{"kind": "function", "function": f"{tmp_path}/reward.py:score"}]},
        "prompter": model | {"path": str(finished("train", *SELF) / "model")},
        "prompts": 2,
        "respond": {"max_tokens": 4},
        "rewrite": {"max_tokens": 4},
    }
    (tmp_path / "reward.py").write_text("def score(prompts, responses):\n    return [len(y) / 9 for y in responses]\n")
    summaries = []
    for name, target in (("shared", "prompter"), ("apart", model | {"path": str(workshop.root / "prompter")})):
        config = validate_config(EvalConfig, common | {"out": str(tmp_path / name), "target": target})
        summary = evaluate(config).as_dict()
        summaries.append({arm: summary[arm] for arm in ("no_finetuning", "align_pro")})
        found = optimal(
            validate_config(OptimalConfig, common | {"out": str(tmp_path / f"{name} optimal"), "target": target})
        )
        summaries[-1] |= {key: found[key] for key in ("reference_reward", "resampled_reward", "kl")}
    assert summaries[0] == summaries[1]


class TestBadInput:
    @pytest.mark.parametrize("kind", ["full", "soft_prompt"])
    def test_without_a_lora(
        self, workshop: Workshop, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert workshop.run("train", tmp_path / "run", "target=policy", f"policy.adapter.kind={kind}") == 1
        assert "set policy.adapter.kind=lora, or name the target's model" in _said(capsys)

    def test_a_target_of_another_name(
        self, workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert workshop.run("train", tmp_path / "run", "target=prompter") == 1
        assert "target: Input should be 'policy' (got 'prompter')" in _said(capsys)

    def test_a_lora_that_would_be_merged_into_the_target(
        self, workshop: Workshop, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        start = finished("train", *ACTIVATED[:2], "target=policy") / "model"
        assert workshop.run("train", tmp_path / "run", *SELF, f"policy.path={start}") == 1
        assert "is an adapter, which is merged into its base model before training" in _said(capsys)

    def test_a_prompt_without_the_invocation(
        self, workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert workshop.run("train", tmp_path / "run", *SELF, "policy.adapter.invocation=Rewrite") == 1
        assert "policy.adapter.invocation: the prompt does not contain the invocation tokens" in _said(capsys)

    def test_a_pair_without_the_invocation_is_left_out(
        self, workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        rows = [{"prompt": f"{word} {i}", "rewrite": "x"} for i in range(6) for word in ("sort", "flip")]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        settings = [*ACTIVATED, f"data.source={tmp_path}/pairs.jsonl", "run.steps=1", "policy.adapter.invocation=sort"]
        with caplog.at_level("WARNING", "alignpro"):
            assert workshop.run("sft", tmp_path / "run", *settings) == 0
        assert "6 of 12 prompts cannot be the model's input" in caplog.text
        assert "pairs.jsonl:2: policy.adapter.invocation: the prompt does not contain the invocation" in caplog.text


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())
