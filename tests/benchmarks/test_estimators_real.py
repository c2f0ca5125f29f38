"""The comparison of estimators on a real model: what it reads off its curves, its preset, and that it runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import typer

from alignpro.cli import main
from alignpro.config import DialMethod, ExperimentConfig, TrainMethod, load_config
from alignpro.experiments.cells import cells
from benchmarks.estimators_real import REAL, Point, interpolated, measure, samples


def test_rewards_are_interpolated_between_the_points_around_a_kl() -> None:
    """The mixture of two prompters has the mixture of their rewards for each prompt."""
    points = [Point(kl, np.full((2, 1, 1), reward)) for kl, reward in ((0.0, 1.0), (0.0, 5.0), (2.0, 2.0), (4.0, 8.0))]
    assert [interpolated(points, kl).mean() for kl in (0.0, 1.0, 2.0, 3.5, 4.0)] == [5.0, 3.5, 2.0, 6.5, 8.0]
    with pytest.raises(ValueError, match="not between"):
        interpolated(points, 4.1)


def test_the_preset_gives_all_estimators_the_same_samples_and_strengths(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA", "OUT", "MODEL"):
        monkeypatch.setenv(name, name.lower())
    config = load_config(ExperimentConfig, [str(REAL / "experiment.yaml"), str(REAL / "estimators.yaml")])
    plan = cells(config)
    trained = [name for name, method in config.methods.items() if isinstance(method, TrainMethod)]
    assert trained == ["align_pro", "exact", "k1", "grpo", "gibbs_loss"]
    dials = {each.of: each.strengths for each in config.methods.values() if isinstance(each, DialMethod)}
    assert list(dials) == trained and len({tuple(each) for each in dials.values()}) == 1
    assert samples(plan) == 30 * 16 * 8
    text = (REAL / "README.md").read_text()
    trainings = sum(job.command == "train" for cell in plan for job in cell.jobs)
    evaluations = sum(cell.method in trained or cell.method.startswith("dial") for cell in plan)
    assert f"{trainings} trainings and {evaluations} evaluations" in text


def in_this_process(
    starter: Sequence[str], arguments: Sequence[str], log: Path, stopped: Callable[[], int | None]
) -> int:
    try:
        main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    raise AssertionError("main returns by SystemExit")


@pytest.mark.slow
def test_it_runs_and_is_continued(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    document = measure(None, quick=True, json_file=file, runner=in_this_process)
    assert json.loads(file.read_text())["results"] == document["results"]
    assert [(row["estimator"], row["seeds"]) for row in document["results"]] == [("exact", 2), ("k1", 2)] * 2
    low, _, high, other = document["results"]
    assert low["kl"] == high["kl"] / 2 and high["less_exact"] is None
    assert other["less_exact"]["value"] == pytest.approx(other["reward"]["value"] - high["reward"]["value"])

    def refuse(*_: object) -> int:
        raise AssertionError("a cell that is done is never run again")

    again = measure([str(tmp_path / "experiment.yaml")], quick=True, json_file=file, runner=refuse)
    assert again["results"] == document["results"]
    with pytest.raises(typer.BadParameter, match="--against k3: there is no such `train` method"):
        measure([str(tmp_path / "experiment.yaml")], quick=True, json_file=file, against="k3")
