"""Where the methods of an experiment are run, and how what they trained is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_experiment import tiny_experiment
from tiny_runs import Workshop

from alignpro.config import EvalConfig, ExperimentConfig, resolve_config
from alignpro.errors import ConfigError
from alignpro.experiments.cells import Cell, cells


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("places"))


def experiment(shop: Workshop, out: Path, methods: dict[str, Any], **changes: Any) -> ExperimentConfig:
    """One with the targets toy, other and both of them, and the tasks letters and digits."""
    given = tiny_experiment(shop, out, methods=methods)
    one = given["targets"]["toy"]
    targets = {"toy": one, "other": one, "both": {"mixture": ["toy", "other"]}}
    tasks = {"letters": given["tasks"]["letters"], "digits": given["tasks"]["letters"] | {"instructions": {}}}
    return resolve_config(ExperimentConfig, given | {"targets": targets, "tasks": tasks} | changes)


def places(plan: list[Cell]) -> list[str]:
    """The cells by task, target and method."""
    return [cell.name.removeprefix("cells/").removesuffix("/seed_0") for cell in plan]


def test_a_method_is_run_for_the_tasks_and_targets_that_it_names(shop: Workshop, tmp_path: Path) -> None:
    methods = {
        "none": {"kind": "none", "targets": ["toy"]},
        "align_pro": {"kind": "train", "tasks": ["digits"], "targets": ["other", "both"]},
        "aside": {"kind": "train", "tasks": ["digits"], "targets": ["other"], "transfer": False},
        "dial": {"kind": "dial", "of": "align_pro", "strengths": [0.5], "targets": ["other"]},
        "adapter": {"kind": "target_adapter", "tasks": ["letters"], "targets": ["other"]},
        "soft": {"kind": "soft_prompt", "before": "target", "tasks": ["digits"], "targets": ["toy"]},
        "gepa": {"kind": "gepa", "target_calls": 99, "tasks": ["letters"], "targets": ["toy"]},
    }
    plan = cells(experiment(shop, tmp_path, methods, transfer=["toy", "other"]))
    assert places(plan) == [
        "letters/toy/none",
        "letters/toy/gepa",
        "letters/other/adapter",
        "digits/toy/none",
        "digits/toy/soft",
        "digits/other/align_pro/tiny",
        "digits/toy/align_pro/tiny/from_other",
        "digits/other/aside/tiny",
        "digits/other/dial/tiny/s_0.5",
        "digits/both/align_pro/tiny",
        "digits/toy/align_pro/tiny/from_both",
        "digits/other/align_pro/tiny/from_both",
    ]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"tasks": ["lettres"]},
            r"methods\.m\.tasks: 'lettres' is none of the experiment: expected one of letters, digits",
        ),
        (
            {"targets": ["all"]},
            r"methods\.m\.targets: 'all' is none of the experiment: expected one of toy, other, both",
        ),
        ({"tasks": []}, r"methods\.m\.\S*tasks: .*at least 1"),
    ],
)
def test_a_place_that_is_none_is_named(shop: Workshop, tmp_path: Path, method: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment(shop, tmp_path, {"m": {"kind": "none"} | method})


@pytest.mark.parametrize("name", ["instruction_tuned", "no_finetuning", "oracle"])
def test_a_key_that_the_report_knows_as_another_method_is_refused(shop: Workshop, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"methods\.{name}: this is what every evaluation calls another method"):
        experiment(shop, tmp_path, {name: {"kind": "train"}})
    assert "oracle" in experiment(shop, tmp_path, {"oracle": {"kind": "rlhf"}}).methods


def test_a_trained_prompter_is_asked_and_sampled_as_in_its_training(shop: Workshop, tmp_path: Path) -> None:
    own = {"prompting": {"meta_prompt": "rewrite"}, "rollout": {"rewrite": {"temperature": 0.5}}}
    here = {"targets": ["toy"], "tasks": ["letters"]}
    methods = {
        "plain": {"kind": "train", **here},
        "asked": {"kind": "train", "settings": own, **here},
        "dial": {"kind": "dial", "of": "asked", "strengths": [0.5]},
        "adapter": {"kind": "target_adapter", "settings": own, **here},
        "self_reward": {"kind": "self_reward", "alphas": [0.5], "iterations": 1, "settings": own, **here},
    }
    plan = cells(experiment(shop, tmp_path, methods, transfer=["other"]))
    asked: dict[str, set[tuple[str, float, int]]] = {}
    for cell in plan:
        evaluation = cell.jobs[-1].config
        assert isinstance(evaluation, EvalConfig)
        how = (evaluation.prompting.meta_prompt, evaluation.rewrite.temperature, evaluation.rewrite.max_tokens)
        asked.setdefault(cell.method, set()).add(how)
    as_trained = {("rewrite", 0.5, 4)}
    assert asked.pop("plain") == {("none", 1.0, 4)}
    assert asked == dict.fromkeys(("asked", "dial", "adapter", "self_reward"), as_trained)
