"""The benchmark of the client of servers runs, and its figures are those of what it asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from benchmarks.endpoints.__main__ import app


def test_it_runs(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"steps": "kept", "rollouts": "measured again"}))
    app(["--quick", "--only", "throughput", "--only", "rollouts", "--json", str(results)], standalone_mode=False)
    document = json.loads(results.read_text())
    assert document["steps"] == "kept" and list(document["parts"]) == ["throughput", "rollouts"]
    assert [speed["ledger"] for speed in document["throughput"]] == [False, True]
    assert all(speed["answers"] == 200 and speed["answers_per_cpu_s"] > 0 for speed in document["throughput"])
    assert all(
        row["median_s"] >= row["prompter_s"] and row["median_s"] >= row["latency"] for row in document["rollouts"]
    )
    assert len(document["rollouts"]) == 3


def test_a_part_that_there_is_not_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="'stairs' is none of throughput, rollouts, steps, judged_steps"):
        app(["--quick", "--only", "stairs", "--json", str(tmp_path / "results.json")], standalone_mode=False)


@pytest.mark.slow
def test_steps_are_measured_with_and_without_sampling_ahead(tmp_path: Path) -> None:
    app(["--quick", "--json", str(tmp_path / "results.json")], standalone_mode=False)
    document = json.loads((tmp_path / "results.json").read_text())
    assert [(row["concurrency"], row["ahead"]) for row in document["steps"]] == [(64, 0), (64, 1), (16, 0), (16, 1)]
    assert [row["judged"] for row in document["judged_steps"]] == ["afterwards", "early"]
    rows = document["steps"] + document["judged_steps"]
    assert all(row["steps"] == 2 and row["step_s"] > row["update_s"] > 0 for row in rows)
