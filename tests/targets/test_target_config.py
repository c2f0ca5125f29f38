"""The key ``target``: a model, the policy, a server or several; what a run may continue with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from alignpro.config import (
    EvalConfig,
    OptimalConfig,
    RemoteTargetConfig,
    TargetMixtureConfig,
    TrainConfig,
    dump_config,
    load_config,
    separate_models,
    target_endpoints,
    target_parts,
    validate_config,
)
from alignpro.errors import ConfigError, TrainingError
from alignpro.planning.spending import describe_spending
from alignpro.training.resume import check_configuration

ENDPOINT: dict[str, Any] = {"endpoint": {"base_url": "https://api.example/v1", "model": "gpt"}}
TRAIN: dict[str, Any] = {
    "run": {"out": "runs/x", "steps": 10},
    "data": {"source": "prompts.jsonl"},
    "policy": {"path": "models/prompter"},
    "reward": {"components": [{"kind": "function", "function": "rewards:exact_match"}]},
}
PRICES = {"gpt": {"input": "0.15", "output": "0.6"}}


def config(target: Any, **settings: Any) -> TrainConfig:
    return validate_config(TrainConfig, {**TRAIN, "target": target, **settings})


def problem(target: Any, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config(target, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    "target",
    [
        {"path": "m"},
        ENDPOINT,
        {"mixture": [{"path": "models/a", "weight": 2}, {**ENDPOINT, "name": "closed"}]},
    ],
)
def test_a_configuration_is_read_back_as_it_was_written(target: dict[str, Any], tmp_path: Path) -> None:
    made = config(target, budget={"usd": "1.5", "tokens": 10}, prices=PRICES, ledger="shared.sqlite")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(made))
    assert load_config(TrainConfig, [str(path)]) == made


def test_the_parts_of_a_target() -> None:
    mixed = config({"mixture": [{"path": "runs/a/model", "weight": 2}, ENDPOINT, {**ENDPOINT, "name": "other"}]})
    assert isinstance(mixed.target, TargetMixtureConfig)
    assert [(part.name, part.weight) for part in target_parts(mixed.target)] == [("a", 2), ("gpt", 1), ("other", 1)]
    assert [model.path for model in separate_models(mixed.target)] == ["runs/a/model"]
    assert len(target_endpoints(mixed.target)) == 2
    alone = config(ENDPOINT)
    assert isinstance(alone.target, RemoteTargetConfig)
    assert separate_models(alone.target) == []
    with pytest.raises(TypeError, match="no model of this process"):
        _ = alone.target_model


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ({"endpoint": {"model": "gpt"}}, "target.endpoint.base_url: missing"),
        (
            {"endpoint": ENDPOINT["endpoint"] | {"sede": True}},
            "target.endpoint.sede: unknown key (did you mean 'seed'?)",
        ),
        ({"endpoint": ENDPOINT["endpoint"] | {"base_url": "ftp://x"}}, "target.endpoint.base_url: expected http"),
        (
            {"endpoint": ENDPOINT["endpoint"] | {"api": "completions", "system": "Be brief."}},
            "target.endpoint: `system` needs api=chat",
        ),
        ({"mixture": [ENDPOINT]}, "target.mixture: List should have at least 2 items"),
        ({"mixture": [ENDPOINT, ENDPOINT]}, "two targets are called 'gpt'"),
        (
            {"mixture": [ENDPOINT, {"path": "a", "weight": 0}]},
            "target.mixture.1.weight: Input should be greater than 0",
        ),
        (
            {"mixture": [ENDPOINT, {"path": "a", "pth": "b"}]},
            "target.mixture.1.pth: unknown key (did you mean 'path'?)",
        ),
        ({"mixture": [ENDPOINT, {"path": "a", "name": "../b"}]}, "which is no name of a directory"),
    ],
)
def test_problems_name_their_key(target: dict[str, Any], told: str) -> None:
    assert told in problem(target)


def test_a_limit_in_dollars_needs_the_price_of_every_model() -> None:
    assert "price of gpt" in problem(ENDPOINT, budget={"usd": 1}, prices={"gtp": PRICES["gpt"]})
    assert "an unknown price is not 0" in problem({"path": "m"}, budget={"usd": 1})
    assert config(ENDPOINT, budget={"usd": 1}, prices=PRICES).budget.usd == 1
    comparison = {name: TRAIN[name] for name in ("data", "reward")} | {"out": "e", "target": ENDPOINT}
    with pytest.raises(ConfigError, match="price of gpt"):
        validate_config(EvalConfig, comparison | {"budget": {"usd": 1}, "prices": {"other": PRICES["gpt"]}})


def test_rewrites_are_resampled_for_one_target() -> None:
    given = {name: TRAIN[name] for name in ("data", "reward")} | {"out": "e", "prompter": {"path": "p"}}
    with pytest.raises(ConfigError, match="for one target"):
        validate_config(OptimalConfig, given | {"target": {"mixture": [ENDPOINT, {"path": "a"}]}})


def test_a_run_continues_with_a_higher_budget_and_other_limits_but_no_other_server(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_config(config(ENDPOINT, budget={"usd": 1}, prices=PRICES)))

    def changed(**settings: Any) -> TrainConfig:
        return config({"endpoint": ENDPOINT["endpoint"] | settings}, budget={"usd": 2}, prices=PRICES)

    check_configuration(saved, changed(max_concurrency=3, api_key_env="OTHER", requests_per_minute=10))
    check_configuration(saved, changed(filtered_reward=0.0))
    for other in ({"model": "gpt-2"}, {"system": "Be brief."}, {"extra_body": {"reasoning_effort": "low"}}):
        with pytest.raises(TrainingError, match=f"target.endpoint.{next(iter(other))}"):
            check_configuration(
                saved, config({"endpoint": ENDPOINT["endpoint"] | other}, prices={**PRICES, "gpt-2": PRICES["gpt"]})
            )


def test_the_cost_of_a_run_is_told_by_formula() -> None:
    rollout = {
        "prompts_per_step": 4,
        "rewrites_per_prompt": 2,
        "responses_per_rewrite": 3,
        "rewrite": {"max_tokens": 50},
        "respond": {"max_tokens": 20},
    }
    settings = {"rollout": rollout, "prompting": {"max_prompt_tokens": 100}, "prices": PRICES, "budget": {"usd": 1}}
    run = TRAIN["run"] | {"eval_every": 5, "eval_prompts": 16}
    step, whole, budget = describe_spending(config(ENDPOINT, run=run, **settings))
    # 4 · 2 · 3 requests of 150 + 20 tokens; (10 · 8 + 2 · 16) · 3 in all
    assert "a step: at most 24 requests and 4,080 tokens" in step
    assert "in all: at most 336 requests and 57,120 tokens" in whole
    usd = 336 * (150 * 0.15 + 20 * 0.6) / 1e6
    assert whole.endswith(f"${usd:.6f}")
    assert budget == "the budget of $1.00 is enough"
    several = {"endpoint": ENDPOINT["endpoint"] | {"n": True}}
    assert "at most 8 requests and 1,680 tokens" in describe_spending(config(several, run=run, **settings))[0]
    mixed = {"mixture": [ENDPOINT | {"weight": 3}, {"path": "m"}]}
    assert "at most 18 requests" in describe_spending(config(mixed, run=run, **settings))[0]
    assert describe_spending(config({"path": "m"})) == []
    assert "no budget" in describe_spending(config(ENDPOINT))[-1]


def test_what_judges_and_servers_of_rewards_are_asked_is_counted() -> None:
    judge = {
        "kind": "judge",
        "endpoint": {"base_url": "http://judge.example", "model": "j"},
        "max_tokens": 5,
        "criteria": "calm",
    }
    http = {
        "kind": "http",
        "server": {"url": "http://score.example"},
        "body": {"t": {"$each": "$response"}},
        "score": "s",
    }
    rollout = {
        "prompts_per_step": 4,
        "rewrites_per_prompt": 2,
        "rewrite": {"max_tokens": 50},
        "respond": {"max_tokens": 20},
    }
    settings = {"rollout": rollout, "prompting": {"max_prompt_tokens": 100}}
    components = [judge | {"attempts": 2}, http | {"batch_size": 3}]
    lines = describe_spending(config({"path": "m"}, reward={"components": components}, **settings))
    # 8 samples; the judge gets 100 + 50 + 20 tokens of texts, its criteria and what is allowed for the rubric
    assert lines[0].startswith("j at http://judge.example, a step: at most 16 requests and ")
    assert f"({170 + 4 + 1024:,} of a prompt, 5 of an answer)" in lines[0]
    assert "http://score.example, a step: at most 3 requests and 0 tokens" in lines[1]
    both = judge | {"mode": "pairwise", "reference": "response"}
    lines = describe_spending(config({"path": "m"}, reward={"components": [both]}, **settings))
    assert "at most 48 requests" in lines[0] and f"({190 + 4 + 1024:,} of a prompt" in lines[0]


def test_a_prompter_at_another_strength_asks_for_each_rewrite() -> None:
    """No fine-tuning 5 requests with n; the prompter and two strengths 5 · 3 each."""
    comparison = {
        "out": "runs/e",
        "data": TRAIN["data"],
        "target": {"endpoint": ENDPOINT["endpoint"] | {"n": True}},
        "reward": TRAIN["reward"],
        "prompter": {"path": "p"},
        "reference": {"path": "r"},
        "arms": ["no_finetuning", "align_pro", "dial_0.25", "dial_0.5"],
        "strengths": [0.25, 0.5],
        "prompts": 5,
        "rewrites_per_prompt": 3,
    }
    (line, _) = describe_spending(validate_config(EvalConfig, comparison))
    assert "in all: at most 50 requests and " in line


def test_what_judges_of_arms_and_counts_of_refusals_ask_is_counted() -> None:
    """Two arms of 5 prompts × 4 responses; 3 harmful prompts likewise; 5 pairs in both orders, each asked up to 3 times."""
    comparison = {
        "out": "runs/e",
        "data": TRAIN["data"],
        "target": ENDPOINT,
        "reward": TRAIN["reward"],
        "instructions": {"short": "Be brief."},
        "prompts": 5,
        "rewrites_per_prompt": 2,
        "judge": {"endpoint": {"base_url": "http://judge.example", "model": "j"}, "max_tokens": 5},
        "refusals": {"harmful": {"source": "harmful.jsonl"}, "prompts": 3},
    }
    lines = describe_spending(validate_config(EvalConfig, comparison))
    assert "gpt at https://api.example/v1, in all: at most 64 requests and " in lines[0]
    assert "j at http://judge.example, in all: at most 30 requests and " in lines[1]
    kept = TRAIN["reward"] | {"guards": [{"kind": "refusal_kept"}]}
    lines = describe_spending(validate_config(EvalConfig, comparison | {"reward": kept}))
    assert "in all: at most 69 requests and " in lines[0]
    chosen = comparison | {"reference": {"path": "p"}, "best_of": [2], "arms": ["no_finetuning", "best_of_2"]}
    without, guarded = (
        _requests(describe_spending(validate_config(EvalConfig, chosen | {"reward": each}))[0])
        for each in (TRAIN["reward"], kept)
    )
    assert guarded - without == 5 + 3  # the harmful prompts are scored as well, to choose among their candidates
    assert "at most 128 requests" in describe_spending(config(ENDPOINT))[0]
    assert "at most 144 requests" in describe_spending(config(ENDPOINT, reward=kept))[0]


def _requests(line: str) -> int:
    return int(line.split("at most ")[1].split()[0].replace(",", ""))


def test_overrides_reach_into_a_target(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({**TRAIN, "target": ENDPOINT}))
    made = load_config(TrainConfig, [str(path), "target.endpoint.max_concurrency=7"])
    assert target_endpoints(made.target)[0].max_concurrency == 7
