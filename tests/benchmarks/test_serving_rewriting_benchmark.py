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
    assert arms["direct"]["rewritten"] == 0 and not arms["direct"]["skipped"]
    assert arms["opt out"]["skipped"] == {"opt_out": arms["opt out"]["chats"]}
    for name in ("rewriting", "rewriting, new prompts", "again, from the cache"):
        row = arms[name]
        assert row["rewritten"] + sum(row["skipped"].values()) == row["chats"]
        assert row["rewritten"] > 0 and "deadline" not in row["skipped"]
    assert arms["again, from the cache"]["rewriting_median_ms"] < arms["rewriting"]["rewriting_median_ms"]
    assert arms["rewriting"]["cpu_ms_per_chat"]["engine"] > 0
