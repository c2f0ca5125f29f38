"""The sweep over learning rates runs, and counts the decades over which the best is reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.step_size import app, reached_over


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    app(["--quick", "--out", str(tmp_path / "runs"), "--json", str(results)], standalone_mode=False)
    document = json.loads(results.read_text())
    assert [(row["learning_rate"], row["step_kl"]) for row in document["results"]] == [(3e-4, 0.2), (1e-3, 0.2)]
    assert all(row["steps"] == 4 and 0 < row["step_KL_max"] <= 0.4 for row in document["results"])
    assert document["reached_over_decades"][0]["step_kl"] == 0.2


def test_the_decades_are_those_of_neighbouring_rates() -> None:
    values = {1e-5: 0.5, 1e-4: 0.96, 1e-3: 1.0, 1e-2: 0.2, 1e-1: 0.97}
    rows = [{"learning_rate": rate, "step_kl": 0.2, "J": value} for rate, value in values.items()]
    assert reached_over(rows, 0.2) == pytest.approx(1.0)
    assert reached_over([{**row, "step_kl": None, "J": 0.1} for row in rows] + rows, None) == 0.0
