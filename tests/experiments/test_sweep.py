"""A sweep is an experiment at several points, and its best point is reported on prompts that did not choose it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_points import sweep
from tiny_experiment import InThisProcess, tiny_experiment
from tiny_runs import Workshop

from alignpro.config import SweepConfig, resolve_config
from alignpro.evaluation.comparison import Record
from alignpro.evaluation.rewards_file import ArmRewards, EvaluationRewards
from alignpro.experiments.cells import Cell
from alignpro.experiments.evaluated_cells import MethodRecords
from alignpro.experiments.points import Point
from alignpro.experiments.run import describe_plan, run_experiment
from alignpro.experiments.sweep_results import selection_places, sweep_analyses

METHODS = {"none": {"kind": "none"}, "gibbs": {"kind": "gibbs", "candidates": [2]}}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("sweep"))
    (made.root / "plain_reward.py").write_text(
        "def score(prompts, responses):\n    return [sum(map(ord, each)) % 17 / 17 for each in responses]\n"
    )
    return made


def swept(shop: Workshop, out: Path, values: list[float], **changes: Any) -> SweepConfig:
    search = {"sweep": {"parameters": {"kl_coef": values}}}
    return resolve_config(SweepConfig, tiny_experiment(shop, out, methods=METHODS, **changes) | search)


def test_every_point_is_run_once_and_points_can_be_added(shop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "swept"
    first = InThisProcess()
    run_experiment(swept(shop, out, [0.05]), first)
    assert len(first.commands) == 2
    more = InThisProcess()
    run_experiment(swept(shop, out, [0.05, 0.5]), more)
    assert [command[3].split("/")[-3] for command in more.commands] == ["kl_coef=0.5"]
    assert describe_plan(swept(shop, out, [0.05, 0.5])) == ["3 cells, all done"] + [
        f"done  cells/letters/toy/{each}/seed_0"
        for each in ("none", "gibbs/tiny/kl_coef=0.05", "gibbs/tiny/kl_coef=0.5")
    ]
    summary = json.loads((out / "summary.json").read_text())
    table, frontier = summary["analyses"]
    assert {each["method"] for each in table["points"]} == {"gibbs_2: kl_coef=0.05", "gibbs_2: kl_coef=0.5"}
    assert table["best"]["prompts"] == 2  # of the four that are held out
    assert [each["series"] for each in frontier["points"]] == ["Gibbs, N = 2"] * 2
    assert frontier["points"][0]["kl"]["value"] >= frontier["points"][1]["kl"]["value"] >= 0
    page = (out / "report.html").read_text()
    assert "Sweep: letters" in page and "Reward against KL: letters" in page


def synthetic(config: SweepConfig, rng: np.random.Generator, name: str, prompts: int) -> MethodRecords:
    """A method whose rewards are noise around 0."""
    raw = rng.normal(size=(prompts, 2, 2))
    rewards = EvaluationRewards([f"{i}" for i in range(prompts)], range(prompts), {name: ArmRewards(raw, raw)}, 0, "r")
    record = Record("letters", "small", "big", name, 0, rewards)
    cell = Cell(Path(name), name, (), "align_pro", point=Point(name, name, {}, config))
    return MethodRecords("letters", "big", "small", name, name, cell, [record])


def test_the_best_of_equal_points_is_reported_without_the_luck_that_chose_it() -> None:
    config = sweep({"parameters": {"kl_coef": [0.1]}})
    rng = np.random.default_rng(0)
    chosen, reported = [], []
    for _ in range(40):
        methods = [synthetic(config, rng, f"align_pro: {i}", 32) for i in range(12)]
        (result,) = sweep_analyses(config, methods)
        best = result.results["best"]
        chosen.append(max(each["selection"]["value"] for each in result.results["points"]))
        reported.append(best["reward"]["value"])
    # The standard deviation of a mean over 16 prompts of 4 rewards is 1/8, that of 40 such means is 1/50.
    assert np.mean(chosen) > 0.15
    assert abs(np.mean(reported)) < 0.06


def test_a_point_with_fewer_seeds_is_not_chosen() -> None:
    config = sweep({"parameters": {"kl_coef": [0.1]}})
    rng = np.random.default_rng(0)
    lucky, others = (synthetic(config, rng, name, 32) for name in ("align_pro: 0", "align_pro: 1"))
    (record,) = others.records
    others = replace(others, records=[record, replace(record, seed=1)])
    for arm in lucky.records[0].rewards.arms.values():
        arm.raw[:] = 9.0
    (result,) = sweep_analyses(config, [lucky, others])
    assert result.results["best"]["method"] == "align_pro: 1"
    assert "These are its 2 trainings: a setting is also chosen by what chance did in a training" in result.text


def test_of_prompts_in_one_cluster_none_is_left_to_report_the_best_point_on(shop: Workshop, tmp_path: Path) -> None:
    """The sweep runs, and its report says so."""
    out = tmp_path / "alike"
    tasks = tiny_experiment(shop, out)["tasks"]
    tasks["letters"]["data"]["cluster"] = "source"
    run_experiment(swept(shop, out, [0.05, 0.5], tasks=tasks), InThisProcess())
    (table, *_) = json.loads((out / "summary.json").read_text())["analyses"]
    assert table["best"]["prompts"] == 0 and table["best"]["versus_no_finetuning"] is None
    assert table["best"]["reward"]["value"] is None and "in one cluster" in table["best"]["reward"]["not_estimable"]
    assert (
        "so that none is left that had no part in the choice: its mean reward is" in (out / "report.html").read_text()
    )


def test_the_prompts_for_choosing_are_whole_clusters_whatever_their_order() -> None:
    ids, clusters = [f"p{i}" for i in range(12)], [i // 3 for i in range(12)]
    places = selection_places(ids, clusters, 0.5)
    assert places.sum() == 6 and all(len(set(places[3 * i : 3 * i + 3])) == 1 for i in range(4))
    backwards = selection_places(ids[::-1], clusters[::-1], 0.5)
    assert (backwards[::-1] == places).all()
    assert selection_places(["a", "b"], [0, 1], 0.01).sum() == 1
