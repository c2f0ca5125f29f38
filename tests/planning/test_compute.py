"""The arithmetic of a run by formula is what PyTorch counts, without the scores of attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny
from tiny_runs import Workshop
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from alignpro.config import RLHFConfig, TrainConfig, load_config
from alignpro.planning.compute import describe_compute, step_compute
from alignpro.planning.dry_run import describe_work


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("compute"))


def training(made: Workshop, *overrides: str) -> TrainConfig:
    return load_config(TrainConfig, made.arguments("train", made.root / "run", *overrides)[1:])


def counted(path: Path, tokens: int, logits: int) -> float:
    """FLOP of the matrix products of a forward pass, as PyTorch counts them."""
    model = AutoModelForCausalLM.from_pretrained(path)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = model.base_model(torch.zeros(1, tokens, dtype=torch.int64)).last_hidden_state
        model.lm_head(hidden[:, :logits])
    found = {str(name): value for name, value in counter.get_flop_counts()["Global"].items()}
    return sum(value for name, value in found.items() if "mm" in name and "bmm" not in name)


def test_each_part_is_what_its_passes_take(made: Workshop) -> None:
    settings = (
        "rollout.prompts_per_step=3",
        "rollout.rewrites_per_prompt=4",
        "rollout.responses_per_rewrite=2",
        "rollout.rewrite.max_tokens=5",
        "rollout.respond.max_tokens=6",
        "prompting.max_prompt_tokens=7",
    )
    step = step_compute(training(made, *settings))
    forward = counted(made.root / "prompter", 3 * 7 + 3 * 4 * 5, 3 * 4 * 5)
    answers = 3 * 4 * 2 * 6
    assert step.parts["rewrites"] == forward
    assert step.parts["responses"] == counted(made.root / "target", 3 * 4 * 5 + answers, answers)
    assert step.parts["credit"] == 2 * forward
    measured = counted(made.root / "prompter", 3 * 7 + 3 * 5, 3 * 5)
    assert step.parts["update"] == 3 * forward + measured
    assert step.total == sum(step.parts.values())
    added = step_compute(training(made, *settings, "prompting.form=addition")).parts
    shared = counted(made.root / "target", 3 * (7 + 4 * 5) + answers, answers)  # a prompt and the additions to it
    assert added == step.parts | {"responses": shared}


def test_an_adapter_needs_no_gradient_of_weights_and_a_server_computes_its_own(made: Workshop) -> None:
    full, lora = (step_compute(training(made, *each)) for each in ((), ("policy.adapter.kind=lora",)))
    assert full.parts["update"] - lora.parts["update"] == pytest.approx(full.parts["rewrites"])
    remote = training(made, "objective.step_kl=null").model_dump()
    remote["target"] = {"endpoint": {"base_url": "http://127.0.0.1:1/v1", "model": "big"}}
    assert "responses" not in step_compute(TrainConfig.model_validate(remote)).parts


def test_several_updates_on_a_rollout_cost_a_pass_each_and_are_measured_each(made: Workshop) -> None:
    several = ("objective.loss=ppo_clip", "objective.epochs=3", "objective.minibatches=2")
    once, thrice = (step_compute(training(made, "objective.step_kl=null", *each)).parts for each in ((), several))
    assert thrice == once | {"update": 3 * once["update"]}
    kl = step_compute(training(made)).parts["update"] - once["update"]
    assert step_compute(training(made, *several)).parts["update"] == pytest.approx(thrice["update"] + 6 * kl)


def test_distillation_computes_updates_on_what_it_keeps(made: Workshop) -> None:
    many = ("objective.loss=gibbs", "objective.step_kl=null", "rollout.rewrites_per_prompt=16")
    kept = ("objective.loss=distillation", "rollout.rewrites_per_prompt=16", "objective.distillation_samples=4")
    few = ("objective.loss=gibbs", "objective.step_kl=null", "rollout.rewrites_per_prompt=4")
    all_of_them, some, as_if = (step_compute(training(made, *each)).parts for each in (many, kept, few))
    assert some == all_of_them | {"update": as_if["update"]} and as_if["update"] < all_of_them["update"]


def test_it_is_described_for_a_whole_run(made: Workshop) -> None:
    oracle = load_config(RLHFConfig, made.arguments("rlhf", made.root / "oracle", "run.steps=7")[1:])
    (line,) = describe_compute(oracle)
    assert "PFLOP in 7 steps" in line and "responses" in line and "credit" in line


def test_self_reward_draws_and_asks_for_more_than_it_trains_on(made: Workshop) -> None:
    grown = ("objective.loss=gibbs", "rollout.rewrites_per_prompt=2", "rollout.rewrite.max_tokens=8")
    grown += ("self_reward.sentences=2", "self_reward.beams=3", "self_reward.branches=4")
    plain = step_compute(training(made, *grown[:3])).parts
    calibrated, alone = (step_compute(training(made, *grown, f"self_reward.alpha={alpha}")).parts for alpha in (0.5, 0))
    assert calibrated["update"] == plain["update"] and calibrated["credit"] == plain["credit"]
    assert calibrated["responses"] == pytest.approx(plain["responses"] * (4 + 3 * 4) / 2)
    assert alone["responses"] == 0 and alone["rewrites"] == calibrated["rewrites"] > plain["rewrites"]
    (_, line, *_) = describe_work(training(made, *grown))
    assert "chosen among those that grow from at most 16 sentences with 16 responses" in line
    assert line.endswith(": at most 128 responses in total")


def test_gpt2_takes_what_pytorch_counts(made: Workshop) -> None:
    path = save_tiny("gpt2", made.root / "gpt2")
    settings = (
        f"policy.path={path}",
        "rollout.prompts_per_step=1",
        "rollout.rewrites_per_prompt=2",
        "rollout.rewrite.max_tokens=5",
        "prompting.max_prompt_tokens=7",
    )
    assert step_compute(training(made, *settings)).parts["rewrites"] == counted(path, 7 + 2 * 5, 2 * 5)
