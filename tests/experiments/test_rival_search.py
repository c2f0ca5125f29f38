"""GEPA and MIPROv2 as they are in dspy, with models of a few thousand weights."""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_experiment import InThisProcess, tiny_experiment
from tiny_runs import Workshop

from alignpro.config import ExperimentConfig, ModelConfig, RivalConfig, resolve_config
from alignpro.data import load_prompts, split
from alignpro.errors import ConfigError, TrainingError
from alignpro.experiments.cells import cells
from alignpro.experiments.rivals.asking import TargetAsker
from alignpro.experiments.rivals.optimizers import asking_once, require_dspy
from alignpro.experiments.rivals.run import search_instruction, search_prompts
from alignpro.experiments.run import run_experiment
from alignpro.models.loading import load_language_model
from alignpro.rewards import build_reward
from alignpro.targets.local import LocalTarget

SEARCH = {"validation": 4, "training": 4, "proposals": 2, "propose": {"max_tokens": 8}}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("rivals"))
    (made.root / "plain_reward.py").write_text(
        "def score(prompts, responses):\n    return [sum(map(ord, each)) % 17 / 17 for each in responses]\n"
    )
    return made


def rival(shop: Workshop, out: Path, kind: str, **changes: Any) -> dict[str, Any]:
    task = tiny_experiment(shop, out)["tasks"]["letters"]
    return {
        "out": str(out),
        "kind": kind,
        "data": task["data"],
        "target": {"path": str(shop.root / "target"), "device": "cpu"},
        "reward": task["reward"],
        "instructions": {"short": "Be brief.", "kind": "Be kind."},
        "target_calls": 40,
        "search": SEARCH,
        "respond": {"max_tokens": 4},
    } | changes


@pytest.mark.parametrize(("kind", "needs"), [("gepa", "gepa"), ("miprov2", "optuna")])
def test_a_search_stays_within_its_calls_and_continues_where_it_was_killed(
    shop: Workshop, tmp_path: Path, kind: str, needs: str
) -> None:
    pytest.importorskip("dspy")
    pytest.importorskip(needs)
    result = search_instruction(rival(shop, tmp_path / "whole", kind))
    assert result["target_calls"] <= 40 and result["limit"] == 40
    assert kind != "gepa" or (result["target_calls"] == 40 and result["refused"])
    assert result["mean"] == max(result["instructions"].values()) == result["instructions"][result["instruction"]]
    assert {"Be brief.", "Be kind."} <= result["instructions"].keys()
    assert result["proposer_calls"] > 0
    calls, means = zip(*result["curve"], strict=True)
    assert list(calls) == sorted(calls) and means[-1] == result["mean"]
    assert (tmp_path / "whole/instruction.txt").read_text() == result["instruction"]
    with pytest.raises(TrainingError, match="already exists"):
        search_instruction(rival(shop, tmp_path / "whole", kind))
    lines = (tmp_path / "whole/answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/answers.jsonl").write_text("".join(lines[:20]) + lines[20][:9])
    again = search_instruction(rival(shop, tmp_path / "killed", kind))
    assert again | {"seconds": 0} == result | {"seconds": 0}


def test_miprov2_proposes_anew_once_its_proposals_are_evaluated(shop: Workshop, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    search = SEARCH | {"minibatch": 2}
    result = search_instruction(rival(shop, tmp_path / "search", "miprov2", target_calls=300, search=search))
    assert (result["target_calls"], result["refused"]) == (300, True)  # two proposals take 60 or so


@pytest.mark.parametrize(("kind", "needs"), [("gepa", "gepa"), ("miprov2", "optuna")])
def test_the_order_and_the_speed_of_threads_change_nothing(
    shop: Workshop, tmp_path: Path, kind: str, needs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dspy")
    pytest.importorskip(needs)
    ask, delays = TargetAsker.ask, random.Random(0)

    def ask_after_a_while(self: TargetAsker, *question: Any) -> Any:
        time.sleep(delays.choice([0, 0.005, 0.1]))  # the last is longer than a batch waits for what is not announced
        return ask(self, *question)

    monkeypatch.setattr(TargetAsker, "ask", ask_after_a_while)
    results = [search_instruction(rival(shop, tmp_path / name, kind, target_calls=60)) for name in "ab"]
    assert results[0] | {"seconds": 0} == results[1] | {"seconds": 0}


def test_a_rival_is_a_method_of_an_experiment_at_the_calls_of_a_training(shop: Workshop, tmp_path: Path) -> None:
    pytest.importorskip("dspy")
    pytest.importorskip("gepa")
    out = tmp_path / "experiment"
    methods = {
        "none": {"kind": "none"},
        "align_pro": {"kind": "train"},
        "gepa": {"kind": "gepa", "target_calls": "align_pro", "search": SEARCH},
    }
    config = tiny_experiment(shop, out, methods=methods)
    config["train"]["run"] = {"steps": 3, "eval_every": 0, "checkpoint_every": 3}
    run_experiment(config, InThisProcess())
    summary = json.loads((out / "summary.json").read_text())
    costs = {name: each["cost"]["target_calls"] for name, each in summary["groups"][0]["methods"].items()}
    assert costs == {"no_finetuning": 0.0, "align_pro": 12.0, "gepa": 12.0}
    (crossing,) = (each for each in summary["analyses"] if each["kind"] == "crossing")
    assert crossing["pairs"][0]["rival"] == "gepa" and crossing["pairs"][0]["difference"]["value"] is not None
    assert "Target calls: letters" in (out / "report.html").read_text()


def test_slow_questions_are_not_asked_twice() -> None:
    pytest.importorskip("dspy")
    module = importlib.import_module("dspy.evaluate.evaluate")
    executor = module.ParallelExecutor
    with asking_once():
        assert module.ParallelExecutor(num_threads=2).timeout == 0
    assert module.ParallelExecutor is executor


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dspy", None)
    with pytest.raises(ConfigError, match=r"kind=gepa: needs dspy: pip install 'alignpro\[rivals\]'"):
        require_dspy("gepa")


def test_the_calls_must_suffice_for_the_hand_written_instructions(shop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"target_calls=8: 2 hand-written instructions on 4 validation prompts take 8 alone"
    ):
        resolve_config(RivalConfig, rival(shop, tmp_path / "few", "gepa", target_calls=8))
    guarded = rival(shop, tmp_path / "few", "gepa", target_calls=12)
    guarded["reward"] = guarded["reward"] | {"guards": [{"kind": "refusal_kept"}]}
    with pytest.raises(ConfigError, match="on 4 validation prompts with the guard refusal_kept take 12 alone"):
        resolve_config(RivalConfig, guarded)


def test_a_rival_has_the_calls_of_the_training_that_it_names(shop: Workshop, tmp_path: Path) -> None:
    methods = {
        "align_pro": {"kind": "train", "settings": {"run": {"steps": 50}}},
        "miprov2": {"kind": "miprov2", "target_calls": "align_pro"},
    }
    config = resolve_config(ExperimentConfig, tiny_experiment(shop, tmp_path / "plan", methods=methods))
    (cell,) = (each for each in cells(config) if each.method == "miprov2")
    assert [job.command for job in cell.jobs] == ["rival", "eval"]
    assert cell.jobs[0].config.target_calls == 50 * 2 * 2  # type: ignore[attr-defined]
    guarded = tiny_experiment(shop, tmp_path / "guarded", methods=methods)
    guarded["tasks"]["letters"]["reward"]["guards"] = [{"kind": "refusal_kept"}]
    (cell,) = (each for each in cells(resolve_config(ExperimentConfig, guarded)) if each.method == "miprov2")
    assert cell.jobs[0].config.target_calls == 50 * 2 * (2 + 1)  # type: ignore[attr-defined]
    unknown = methods | {"miprov2": {"kind": "miprov2", "target_calls": "grpo"}}
    with pytest.raises(ConfigError, match=r"methods.miprov2.target_calls=grpo: expected a number"):
        resolve_config(ExperimentConfig, tiny_experiment(shop, tmp_path / "plan", methods=unknown))


def test_a_rival_has_the_validation_prompts_of_a_training_and_no_held_out_one(shop: Workshop, tmp_path: Path) -> None:
    given = rival(shop, tmp_path / "out", "gepa", search={"validation": 4, "training": 40})
    given["data"] = given["data"] | {"holdout": 0.3, "validation": 0.3}
    config = resolve_config(RivalConfig, given)
    prompts = load_prompts(config.data).prompts
    held_out = {prompt.id for prompt in split(prompts, 0.3, config.data.holdout_by)[1]}
    trained_on = {prompt.id for prompt in split(prompts, 0.6, config.data.holdout_by)[0]}
    assert isinstance(config.target, ModelConfig)
    target = LocalTarget.build(load_language_model(config.target), config.target, config.prompting, config.respond)
    found = {prompt.id for each in search_prompts(config, target, build_reward(config.reward)) for prompt in each}
    assert found.isdisjoint(held_out) and trained_on < found


@pytest.mark.parametrize(("kind", "needs"), [("gepa", "gepa"), ("miprov2", "optuna")])
@pytest.mark.parametrize("written", ["Be brief.\n", "  Be brief:\n    two lines", ""])
def test_a_hand_written_instruction_is_asked_as_it_is_written(
    shop: Workshop, tmp_path: Path, kind: str, needs: str, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dspy strips and dedents instructions, and has one of its own for an empty one: these would be other instructions."""
    pytest.importorskip("dspy")
    pytest.importorskip(needs)
    asked = set[str]()
    ask = TargetAsker.ask

    def ask_and_note(self: TargetAsker, instruction: str, *others: Any) -> Any:
        asked.add(instruction)
        return ask(self, instruction, *others)

    monkeypatch.setattr(TargetAsker, "ask", ask_and_note)
    result = search_instruction(rival(shop, tmp_path / "out", kind, instructions={"only": written}))
    assert written in asked
    assert not any(
        each.split() == written.split() and each != written for each in asked | result["instructions"].keys()
    )
    assert not any("produce the fields" in each for each in asked)
