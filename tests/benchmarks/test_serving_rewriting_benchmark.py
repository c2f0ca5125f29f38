"""The benchmark of rewriting runs, and its arms did what they are named after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.serving_rewriting import app


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    app(["--quick", "--json", str(tmp_path / "results.json")], standalone_mode=False)
    arms = {arm["arm"]: arm for arm in json.loads((tmp_path / "results.json").read_text())["arms"]}
    assert arms["opt out"]["skipped"] == {"opt_out": 20}
    assert arms["rewriting"]["rewritten"] == arms["again, from the cache"]["rewritten"] > 0
    assert arms["again, from the cache"]["median_ms"] < arms["rewriting"]["median_ms"]
    assert arms["rewriting, new prompts"]["rewritten"] > 0
