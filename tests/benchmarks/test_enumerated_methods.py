"""The benchmarks of mixtures and of self-reward in enumerable worlds: their tables in the docs are those of their results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from benchmarks import pareto, self_reward
from benchmarks.estimators.world import World

ROOT = Path(__file__).parents[2]
DOCS: dict[str, tuple[str, Callable[..., list[str]]]] = {
    "pareto": ("mixtures.md", pareto.markdown),
    "self_reward": ("self_reward.md", self_reward.markdown),
}


@pytest.mark.parametrize("name", DOCS)
def test_the_table_in_the_docs_is_that_of_the_results(name: str) -> None:
    recorded = json.loads((ROOT / "benchmarks/results/cpu" / f"{name}.json").read_text())
    document, markdown = DOCS[name]
    assert "\n".join(markdown(recorded["results"])) in (ROOT / "docs" / document).read_text()


@pytest.mark.parametrize("app", [pareto.app, self_reward.app], ids=list(DOCS))
def test_it_runs(app: typer.Typer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["--quick", "--json", str(tmp_path / "results.json")], standalone_mode=False)
    assert json.loads((tmp_path / "results.json").read_text())["results"] and capsys.readouterr().out
    assert (tmp_path / "results.png").exists()


def test_mixtures_of_optimal_prompters_are_what_is_trained_for_the_sum() -> None:
    world = World(2, 0.4, vocabulary=3, max_length=2)
    other = World(2, 0.4, vocabulary=3, max_length=2, seed=1).rewards
    rows: list[dict[str, Any]] = pareto.frontier(world, other, [200])
    of = {(row["weight"], row["series"]): row for row in rows}
    for weight in pareto.WEIGHTS:
        mixed, trained = (of[weight, name] for name in ("mixture", "trained"))
        assert mixed["objective"] == pytest.approx(trained["objective"], abs=1e-4)
        assert of[weight, "token by token"]["objective"] <= mixed["objective"] + 1e-4
    assert of[0.0, "mixture"]["rewards"][0]["value"] > of[1.0, "mixture"]["rewards"][0]["value"]


def test_rewards_follow_likelihoods_as_far_as_the_correlation_says() -> None:
    for correlation in self_reward.CORRELATIONS:
        logprob, rewards = self_reward.worlds(200, correlation)
        normal = torch.special.ndtri(rewards)
        centred = logprob - logprob.mean(1, keepdim=True)
        found = torch.corrcoef(torch.stack([centred.flatten(), normal.flatten()]))[0, 1].item()
        assert found == pytest.approx(correlation, abs=0.05)
