"""Methods that train something else than a prompter of its own: the target's adapter, soft prompts, self-reward in iterations."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_experiment import InThisProcess, tiny_experiment
from tiny_runs import Workshop

from alignpro.config import EvalConfig, ExperimentConfig, SweepConfig, TrainConfig, resolve_config
from alignpro.errors import ConfigError
from alignpro.evaluation.comparison import Record
from alignpro.evaluation.rewards_file import ArmRewards, EvaluationRewards
from alignpro.experiments.cells import Cell, cells
from alignpro.experiments.evaluated_cells import MethodRecords
from alignpro.experiments.method_names import method_name
from alignpro.experiments.run import run_experiment
from alignpro.experiments.self_reward_gains import self_reward_analyses

METHODS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "prior": {"kind": "prior"},
    "own_adapter": {"kind": "target_adapter", "settings": {"policy": {"adapter": {"rank": 2}}}},
    "soft": {"kind": "soft_prompt", "virtual_tokens": 2},
    "answering": {"kind": "soft_prompt", "before": "target", "virtual_tokens": 2, "label": "Soft prompt of the target"},
    "self_reward": {
        "kind": "self_reward",
        "alphas": [0.5],
        "iterations": 2,
        "settings": {"self_reward": {"sentences": 2, "beams": 2, "branches": 2}},
    },
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("policies"))
    (made.root / "plain_reward.py").write_text(
        "def score(prompts, responses):\n    return [sum(map(ord, each)) % 17 / 17 for each in responses]\n"
    )
    return made


def planned(shop: Workshop, out: Path, **changes: Any) -> dict[str, Cell]:
    """Name of a cell's directory, without seed → the cell."""
    given = resolve_config(ExperimentConfig, tiny_experiment(shop, out, methods=METHODS, **changes))
    return {cell.name.removeprefix("cells/letters/toy/").removesuffix("/seed_0"): cell for cell in cells(given)}


def synthetic(rng: np.random.Generator, iteration: int, mean: float, method: str = "self_reward") -> MethodRecords:
    """An iteration of self-reward with this mean reward."""
    raw = np.full((64, 2, 2), mean) + 0.1 * rng.normal(size=(64, 2, 2))
    name = f"{method}_0_{iteration}"
    rewards = EvaluationRewards([f"{i}" for i in range(64)], range(64), {name: ArmRewards(raw, raw)}, 0, "r")
    cell = Cell(Path(name), name, (), method, iteration=iteration, alpha=0.0)
    return MethodRecords(
        "letters", "toy", "tiny", name, name, cell, [Record("letters", "tiny", "toy", name, 0, rewards)]
    )


def test_gains_that_fade_are_told(shop: Workshop, tmp_path: Path) -> None:
    config = resolve_config(ExperimentConfig, tiny_experiment(shop, tmp_path, methods=METHODS))
    rng = np.random.default_rng(0)
    found = [synthetic(rng, i, mean) for i, mean in ((3, 0.41), (1, 0.2), (2, 0.4))]
    (analysis,) = self_reward_analyses(config, found)
    gains = [row["gain"] for row in analysis.results["iterations"]]
    assert (
        gains[0] is None and gains[1]["low"] > 0.1 > gains[2]["high"]
    )  # nothing is known of what came before the first
    first, last = (f"{each['value']:.3f} [{each['low']:.3f}, {each['high']:.3f}]" for each in gains[1:])
    assert f"Self-reward, α = 0: {first} in iteration 2, {last} in iteration 3." in analysis.text
    assert analysis.figure.startswith(b"<?xml") or b"<svg" in analysis.figure


def test_two_methods_of_self_reward_are_series_of_their_own(shop: Workshop, tmp_path: Path) -> None:
    """The gain of an iteration is over that of its own method."""
    methods = {"self_reward": METHODS["self_reward"], "groups": METHODS["self_reward"]}
    config = resolve_config(ExperimentConfig, tiny_experiment(shop, tmp_path, methods=methods))
    rng = np.random.default_rng(0)
    means = {"self_reward": (0.2, 0.4), "groups": (0.5, 0.6)}
    found = [synthetic(rng, i, of[i - 1], name) for i in (1, 2) for name, of in means.items()]
    (analysis,) = self_reward_analyses(config, found)
    gains = {row["series"]: row["gain"]["value"] for row in analysis.results["iterations"] if row["gain"] is not None}
    assert gains == {
        "Self-reward (self_reward), α = 0": pytest.approx(0.2, abs=0.03),
        "Self-reward (groups), α = 0": pytest.approx(0.1, abs=0.03),
    }
    assert method_name(config, "groups") == "Self-reward (groups)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"run": {"steps": 1, "seed": 7}}}, r"train\.run\.seed: would be that of all cells.*use `seeds`"),
        ({"rlhf": {"run": {"out": "x"}}}, r"rlhf\.run\.out: .*use `out` of the experiment"),
        ({"settings": {"run": {"seed": 1}}}, r"methods\.grown\.settings\.run\.seed: would be that of all cells"),
        ({"settings": {"self_reward": {"alpha": 0.3}}}, r"settings\.self_reward\.alpha: .* use `alphas` of the method"),
    ],
)
def test_what_tells_cells_apart_is_not_set_for_all_of_them(
    shop: Workshop, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Three seeds were three times the same training, and each α the same one."""
    methods = {"grown": {"kind": "self_reward", "alphas": [0, 1], "settings": changes.get("settings", {})}}
    others = {key: value for key, value in changes.items() if key != "settings"}
    with pytest.raises(ConfigError, match=message):
        resolve_config(ExperimentConfig, tiny_experiment(shop, tmp_path, methods=methods, **others))


def test_methods_that_their_kind_names_are_told_apart(shop: Workshop, tmp_path: Path) -> None:
    dial = {"kind": "dial", "of": "align_pro"}
    methods = {
        "align_pro": {"kind": "train"},
        "dial_one": dial,
        "dial_other": dial,
        "dial_own": dial | {"label": "Weaker"},
        "gepa": {"kind": "gepa", "target_calls": 100},
        "self_reward": METHODS["self_reward"],
    }
    config = resolve_config(ExperimentConfig, tiny_experiment(shop, tmp_path, methods=methods))
    assert [method_name(config, key) for key in list(methods)[1:]] == [
        "Dial (dial_one)",
        "Dial (dial_other)",
        "Weaker",
        "GEPA",
        "Self-reward",
    ]


@pytest.mark.slow
def test_they_are_run_and_compared(shop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "all"
    run_experiment(tiny_experiment(shop, out, methods=METHODS), InThisProcess())
    summary = json.loads((out / "summary.json").read_text())
    (group,) = summary["groups"]
    names = {
        "no_finetuning",
        "sft_prompter",
        "own_adapter",
        "soft",
        "answering",
        "self_reward_0.5_1",
        "self_reward_0.5_2",
    }
    assert set(group["methods"]) == names
    cost = {name: group["methods"][name]["cost"]["target_calls"] for name in names}
    first, second = (cost[f"self_reward_0.5_{i}"] for i in (1, 2))
    most = 2 * (2 + 4)  # two prompts, two beginnings after the start and four after those
    assert 0 < first <= most and first < second <= first + most
    (analysis,) = (each for each in summary["analyses"] if each["kind"] == "self_reward")
    rows = analysis["iterations"]
    assert [(row["series"], row["alpha"], row["iteration"]) for row in rows] == [
        ("Self-reward, α = 0.5", 0.5, i) for i in range(3)
    ]
    assert rows[0]["gain"] is None and all(
        row["gain"]["value"] == pytest.approx(row["reward"]["value"] - before["reward"]["value"])
        for before, row in pairwise(rows)
    )
    page = (out / "report.html").read_text()
    assert "Self-reward: letters" in page and "Soft prompt of the target" in page
    again = InThisProcess()
    run_experiment(tiny_experiment(shop, out, methods=METHODS), again)
    assert again.commands == []


def test_the_targets_adapter_shares_its_weights_and_starts_from_the_target(shop: Workshop, tmp_path: Path) -> None:
    cell = planned(shop, tmp_path)["own_adapter"]
    training, evaluation = (job.config for job in cell.jobs)
    assert isinstance(training, TrainConfig) and isinstance(evaluation, EvalConfig)
    target = str(shop.root / "target")
    assert (training.target, training.policy.path, training.policy.adapter.kind) == ("policy", target, "lora")
    assert training.policy.adapter.rank == 2
    assert evaluation.target == "prompter" and evaluation.reference is not None
    assert evaluation.reference.path == target and cell.prompter is None


def test_a_soft_prompt_is_before_the_prompter_or_before_the_target(shop: Workshop, tmp_path: Path) -> None:
    plan = planned(shop, tmp_path)
    before_prompter, before_target = plan["soft/tiny"], plan["answering"]
    assert [job.command for job in before_prompter.jobs] == ["train", "eval"]
    assert [job.command for job in before_target.jobs] == ["rlhf", "eval"]
    for cell, path in ((before_prompter, "prompter"), (before_target, "target")):
        policy = cell.jobs[0].config.policy  # type: ignore[attr-defined]
        assert (policy.adapter.kind, policy.adapter.virtual_tokens) == ("soft_prompt", 2)
        assert policy.path == str(shop.root / path)


def test_an_iteration_starts_from_the_one_before_and_is_compared_with_the_prior(shop: Workshop, tmp_path: Path) -> None:
    plan = planned(shop, tmp_path, prior=True)
    first, second = (plan[f"self_reward/tiny/alpha_0.5/iteration_{i}"] for i in (1, 2))
    prior = str(tmp_path / "priors/tiny/run/model")
    assert first.needs is plan["priors/tiny"] and second.needs is first
    starts = [cell.jobs[0].config.policy.path for cell in (first, second)]  # type: ignore[attr-defined]
    assert starts == [prior, str(first.directory / "run/model")]
    references = [cell.jobs[1].config.reference.path for cell in (first, second)]  # type: ignore[attr-defined]
    assert references == [prior, prior]
    seeds = {cell.jobs[0].config.run.seed for cell in (first, second)}  # type: ignore[attr-defined]
    assert len(seeds) == 2


def test_they_are_points_of_a_sweep(shop: Workshop, tmp_path: Path) -> None:
    search = {"sweep": {"parameters": {"kl_coef": [0.1, 0.2]}}}
    given = tiny_experiment(shop, tmp_path, methods={name: METHODS[name] for name in ("own_adapter", "self_reward")})
    plan = cells(resolve_config(SweepConfig, given | search))
    assert [cell.name.removeprefix("cells/letters/toy/").removesuffix("/seed_0") for cell in plan] == [
        *(f"own_adapter/kl_coef={λ}" for λ in (0.1, 0.2)),
        *(f"self_reward/tiny/kl_coef={λ}/alpha_0.5/iteration_{i}" for λ in (0.1, 0.2) for i in (1, 2)),
    ]


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ({"kind": "soft_prompt", "before": "target"}, "a soft prompt is vectors, not text that could be sent to it"),
        ({"kind": "target_adapter"}, "so no adapter can be put on it"),
        (
            {"kind": "train", "settings": {"self_reward": {}}},
            "self_reward is a method of its own: set kind=self_reward",
        ),
        ({"kind": "self_reward", "alphas": [0.5, 0.5]}, "0.5 is given twice"),
    ],
)
def test_what_cannot_be_is_named(shop: Workshop, tmp_path: Path, method: dict[str, Any], problem: str) -> None:
    remote = {"behind": {"endpoint": {"base_url": "http://127.0.0.1:9/v1", "model": "big"}}}
    with pytest.raises(ConfigError, match=problem):
        resolve_config(ExperimentConfig, tiny_experiment(shop, tmp_path, methods={"m": method}, targets=remote))
