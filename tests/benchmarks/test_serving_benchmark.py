"""The benchmark of the proxy runs, and its figures are those of what it did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.serving.__main__ import app


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    app(["--quick", "--json", str(tmp_path / "results.json")], standalone_mode=False)
    document = json.loads((tmp_path / "results.json").read_text())
    added = document["overhead"]
    assert added["direct"]["chats"] > 4
    assert added["proxy"]["p50_ms"] > added["latency_ms"]
    assert added["proxy"]["cpu_ms_per_chat"]["proxy"] > 0
    assert added["direct"]["cpu_ms_per_chat"]["proxy"] >= 0
    assert document["streams"]["equal"] == document["streams"]["streams"] == 8
    assert document["disconnects"]["disconnects"] == 40
    crowd = document["overload"]
    assert crowd["answered"] + crowd["refused"] == crowd["chats"] == 40
    assert crowd["refused"] == crowd["refused_with_retry_after"] > 0
    assert crowd["answered"] >= crowd["places"] + crowd["queued"]
    assert crowd["answered_after"] == 10
