"""The comparison of training against a server with training in process runs, continues, and compares the same prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import Workshop
from tiny_server import TinyServer

from benchmarks.server_training import advice
from benchmarks.server_training.__main__ import TRAINING_PROMPTS, app


@pytest.mark.slow
def test_it_runs_and_a_second_call_pays_nothing(workshop: Workshop, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    arguments = ["--model", str(workshop.root / "prompter"), "--served", "tiny", "--steps", "1"]
    arguments += ["--out", str(tmp_path / "runs"), "--json", str(results)]
    with TinyServer() as server:
        app([*arguments, "--url", server.url], standalone_mode=False)
        asked = server.count
        app([*arguments, "--url", server.url], standalone_mode=False)
        assert server.count - asked <= 1  # its version
    document = json.loads(results.read_text())
    assert [len(rows) for rows in document["training"].values()] == [1, 1]
    assert document["heldout_prompts"] == len(advice.questions()) - TRAINING_PROMPTS
    assert set(document["rewards"]) == {"untrained", "in process", "server"}
    assert document["difference"]["low"] <= document["difference"]["value"] <= document["difference"]["high"]


def test_commas_are_counted_up_to_the_whole_reward() -> None:
    assert advice.commas([], ["none", "a, b, c", "," * 20]) == [0.0, 2 / advice.COMMAS, 1.0]
    assert len(set(advice.questions())) == len(advice.questions())
