"""Prompters that were trained on one target, evaluated on others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_experiment import InThisProcess, tiny_experiment
from tiny_runs import Workshop

from alignpro.config import ExperimentConfig, TargetMixtureConfig, TrainConfig, resolve_config
from alignpro.errors import ConfigError, DataError, TrainingError
from alignpro.evaluation import several_targets
from alignpro.evaluation.comparison import Record
from alignpro.evaluation.rewards_file import ArmRewards, EvaluationRewards
from alignpro.experiments.cells import Cell, cells
from alignpro.experiments.evaluated_cells import MethodRecords
from alignpro.experiments.run import run_experiment
from alignpro.experiments.transfer import transfer_analyses

METHODS: dict[str, Any] = {"none": {"kind": "none"}, "align_pro": {"kind": "train"}}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("transfer"))
    (made.root / "plain_reward.py").write_text(
        "def score(prompts, responses):\n    return [sum(map(ord, each)) % 17 / 17 for each in responses]\n"
    )
    return made


def experiment(shop: Workshop, out: Path, **changes: Any) -> dict[str, Any]:
    first = {"path": str(shop.root / "target"), "device": "cpu"}
    targets = {
        "toy": first,
        "other": first | {"path": str(shop.root / "prompter")},
        "both": {"mixture": ["toy", "other"]},
    }
    settings = {"methods": METHODS, "targets": targets, "transfer": True} | changes
    return tiny_experiment(shop, out, **settings)


def test_each_prompter_is_evaluated_on_every_other_single_target(shop: Workshop, tmp_path: Path) -> None:
    plan = cells(resolve_config(ExperimentConfig, experiment(shop, tmp_path)))
    assert [(cell.name.removeprefix("cells/letters/"), [job.command for job in cell.jobs]) for cell in plan] == [
        ("toy/none/seed_0", ["eval"]),
        ("toy/align_pro/tiny/seed_0", ["train", "eval"]),
        ("other/align_pro/tiny/from_toy/seed_0", ["eval"]),
        ("other/none/seed_0", ["eval"]),
        ("other/align_pro/tiny/seed_0", ["train", "eval"]),
        ("toy/align_pro/tiny/from_other/seed_0", ["eval"]),
        ("both/align_pro/tiny/seed_0", ["train"]),
        ("toy/align_pro/tiny/from_both/seed_0", ["eval"]),
        ("other/align_pro/tiny/from_both/seed_0", ["eval"]),
    ]
    mixed = plan[6].jobs[0].config
    assert isinstance(mixed, TrainConfig) and isinstance(mixed.target, TargetMixtureConfig)
    assert [part.name for part in mixed.target.mixture] == ["toy", "other"]
    assert plan[7].needs is plan[6] and plan[7].trained_on == "both"
    methods = METHODS | {
        "own": {"kind": "train", "transfer": False}
    }  # on a mixture, it would be trained and never evaluated
    own = cells(resolve_config(ExperimentConfig, experiment(shop, tmp_path, methods=methods)))
    assert [cell.target for cell in own if cell.method == "own"] == ["toy", "other"]
    some = cells(resolve_config(ExperimentConfig, experiment(shop, tmp_path, transfer=["toy"])))
    assert [cell.trained_on for cell in some if cell.trained_on] == ["other", "both"]


def test_an_evaluation_on_a_mixture_goes_on_and_each_of_its_targets_is_in_the_report(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(shop, tmp_path / "mixed", transfer=False, methods=METHODS)
    config["targets"] = {"both": {"mixture": [config["targets"]["toy"], config["targets"]["other"]]}}
    config["tasks"]["others"] = config["tasks"]["letters"]
    asked, evaluate = [], several_targets.evaluate

    def interrupted(own: Any, **others: Any) -> Any:
        asked.append(own.out.name)
        if len(asked) == 2:
            raise DataError("the power is gone")
        return evaluate(own, **others)

    monkeypatch.setattr(several_targets, "evaluate", interrupted)
    with pytest.raises(TrainingError, match="1 of 4 cells failed"):
        run_experiment(config, InThisProcess())
    run_experiment(config, InThisProcess())
    assert len(asked) == len(set(asked)) * 4 + 1  # two tasks with two methods, and the one that was interrupted
    groups = json.loads((tmp_path / "mixed" / "summary.json").read_text())["groups"]
    targets = {f"both: {name}" for name in asked}
    assert {(each["task"], each["target"]) for each in groups} == {
        (task, t) for task in ("letters", "others") for t in targets
    }
    assert all({*each["methods"]} == {"no_finetuning", "align_pro"} for each in groups)


def synthetic(target: str, method: str, arm: str, mean: float, trained_on: str | None = None) -> MethodRecords:
    """A method on 20 prompts whose rewards lie around a mean."""
    raw = mean + 0.01 * np.random.default_rng(round(1000 * mean)).normal(size=(20, 2, 2))
    rewards = EvaluationRewards([f"{i}" for i in range(20)], range(20), {arm: ArmRewards(raw, raw)}, 0, "r")
    cell = Cell(Path(method), method, (), method, task="letters", target=target, trained_on=trained_on)
    prompter = None if arm == "no_finetuning" else "small"
    key = method if trained_on is None else f"{method}: from {trained_on}"
    return MethodRecords(
        "letters", target, prompter, key, key, cell, [Record("letters", prompter, target, key, 0, rewards)]
    )


def test_the_map_has_the_gain_of_each_training_on_each_target(shop: Workshop, tmp_path: Path) -> None:
    config = resolve_config(ExperimentConfig, experiment(shop, tmp_path))
    trained = [
        ("toy", 0.9, None),
        ("other", 0.6, "toy"),
        ("other", 0.7, None),
        ("toy", 0.4, "other"),
        ("toy", 0.8, "both"),
    ]
    methods = [synthetic(target, "none", "no_finetuning", 0.5) for target in ("toy", "other")]
    methods = [replace(each, method="no_finetuning") for each in methods]
    methods.append(synthetic("toy", "sft_prompter", "sft_prompter", 0.45))
    methods += [synthetic(target, "align_pro", "align_pro", mean, origin) for target, mean, origin in trained]
    (found,) = transfer_analyses(config, methods)
    values = {(each["trained_on"], each["evaluated_on"]): each["value"] for each in found.results["values"]}
    expected = {
        ("(before training)", "toy"): -0.05,
        ("toy", "toy"): 0.4,
        ("toy", "other"): 0.1,
        ("other", "other"): 0.2,
        ("other", "toy"): -0.1,
        ("both", "toy"): 0.3,
    }
    assert values == pytest.approx(expected, abs=0.01)  # the means of 80 rewards with a deviation of 0.01
    assert [row[0] for row in found.rows] == ["(before training)", "toy", "other", "both"]
    assert found.rows[3][2] == "–" and found.figure.startswith(b"<?xml")
    assert "2 of 3 are above 0 and 1 are below" in found.text
    (means,) = transfer_analyses(config, methods[2:])
    assert means.results["of"] == "reward"


@pytest.mark.slow
def test_the_report_has_a_map_of_gains(shop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "mapped"
    config = experiment(shop, out, transfer=["other"])
    del config["targets"]["both"]
    run_experiment(config, InThisProcess())
    summary = json.loads((out / "summary.json").read_text())
    (found,) = (each for each in summary["analyses"] if each["kind"] == "transfer")
    assert found["of"] == "gain"
    assert {(each["trained_on"], each["evaluated_on"]) for each in found["values"]} == {
        ("toy", "toy"),
        ("toy", "other"),
        ("other", "other"),
    }
    (other,) = (group for group in summary["groups"] if group["target"] == "other")
    moved = other["methods"]["align_pro: from toy"]
    assert moved["label"] == "Align-Pro trained on toy" and moved["cost"]["target_calls"] == 4.0
    (value,) = (
        each["value"] for each in found["values"] if (each["trained_on"], each["evaluated_on"]) == ("toy", "other")
    )
    assert value == pytest.approx(moved["versus_no_finetuning"]["value"])
    assert "Transfer: letters" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transfer": ["both"]}, "transfer: 'both' is no single target"),
        ({"transfer": ["gemma"]}, "transfer: 'gemma' is no single target"),
        ({"methods": {"none": {"kind": "none"}}}, "transfer needs a `train` method"),
        ({"targets": {"both": {"mixture": ["toy", "other"]}}}, r"targets\.both\.mixture: 'toy' is no single target"),
    ],
)
def test_what_cannot_be_transferred_is_named(
    shop: Workshop, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_config(ExperimentConfig, experiment(shop, tmp_path, **changes))
