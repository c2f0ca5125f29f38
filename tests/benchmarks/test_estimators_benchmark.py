"""The benchmark of gradient estimators: its table in the docs is that of its results, and what it measures is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.estimators.__main__ import app, at_policies, markdown
from benchmarks.estimators.gradient import CASES
from benchmarks.estimators.measure import objective_gradient, updated
from benchmarks.estimators.world import World

ROOT = Path(__file__).parents[2]


def test_the_table_in_the_docs_is_that_of_the_results() -> None:
    recorded = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "estimators.json").read_text())
    assert {row["case"] for row in recorded["results"]} == {case.name for case in CASES}
    assert "\n".join(markdown(recorded["results"])) in (ROOT / "docs" / "training.md").read_text()


def test_the_optimum_is_the_best_policy_and_updates_move_as_far_as_they_say() -> None:
    world = World(2, 0.3, vocabulary=3, max_length=3)
    best = world.tilted(1.0)
    torch.testing.assert_close(world.objective(best), world.optimum())
    assert objective_gradient(world, best).abs().max() < 1e-10
    torch.testing.assert_close(world.tilted(0.0), world.reference)
    one = World(1, 0.3, vocabulary=3, max_length=3)
    later = updated(one, one.reference, 0.01)
    before = one.sequence_logprob(one.reference)
    moved = (before.exp() * (before - one.sequence_logprob(later))).sum().item()
    assert moved == pytest.approx(0.01, rel=1e-6)
    assert one.objective(later) > one.objective(one.reference)


def test_what_is_said_to_be_unbiased_is_and_regressed_varies_least() -> None:
    found = {case.name: at_policies(0.5, case) for case in CASES if case.advantage == "leave_one_out"}
    for case in ("exact", "k1", "k1_sequence", "regressed"):
        assert found[case]["bias"] < 1e-10
    assert found["k3"]["bias"] > 0.05
    for policy in ("half", "optimum", "beyond"):
        least = min(each[f"variance/{policy}"] for name, each in found.items() if name != "exact, token")
        assert found["regressed"][f"variance/{policy}"] <= 1.05 * least + 1e-20


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["--quick", "--kl-coef", "0.1", "--json", str(tmp_path / "results.json")], standalone_mode=False)
    assert "running_baseline" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == len(CASES)


def test_results_are_json_although_some_trainings_never_arrive(tmp_path: Path) -> None:
    """JSON has no infinity: programs other than Python's refuse it."""
    app(["--quick", "--kl-coef", "0.1", "--json", str(tmp_path / "results.json")], standalone_mode=False)
    for file in (tmp_path / "results.json", ROOT / "benchmarks" / "results" / "cpu" / "estimators.json"):
        rows = json.loads(file.read_text(), parse_constant=pytest.fail)["results"]
        assert any(row["samples"] is None for row in rows)
