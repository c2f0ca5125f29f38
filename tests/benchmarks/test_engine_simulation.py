"""The simulation of the engine on a GPU: its scheduler is real, and so few graphs are captured as a GPU would capture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks.engine.__main__ import app
from benchmarks.engine.floor import num_weights
from benchmarks.engine.simulation.cards import CARDS
from benchmarks.engine.simulation.operations import attention_operations, operations
from benchmarks.engine.simulation.run import _Work, simulate
from benchmarks.engine.simulation.stub import Pass
from benchmarks.workload import GPU, ModelShape

SMALL = replace(GPU, prompts=6, K=4, M=2, meta_prompt=20, prompt=40, rewrite=24, template=30, response=40)


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    return simulate(SMALL, CARDS["h100"], max_batch=32, runs=3, seed=0)


def test_later_runs_replay_the_graphs_of_the_first(runs: list[dict[str, Any]]) -> None:
    """Between them the prompter's weights have changed and the pool was released, as in training."""
    for run in runs[1:]:
        for model in run["models"].values():
            assert model["captures"] <= 1 and model["passes"].get("padded", 0) <= 2
            assert model["passes"]["replayed"] > 40
    assert 0 < sum(model["captures"] for model in runs[0]["models"].values()) <= 12


def test_every_pass_is_accounted_for(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        passes = sum(sum(model["passes"].values()) for model in run["models"].values())
        assert run["ticks"] + run["mixed_ticks"] == pytest.approx(passes, abs=2)  # some ticks only draw
        assert run["floor_s"] <= run["predicted_s"] and run["host_full_ticks"] > 0
    for name, shape in (("policy", GPU.prompter), ("target", GPU.target)):
        model = runs[0]["models"][name]
        count = sum(model["passes"].values())
        assert model["bytes"] > 2 * num_weights(shape, head=True) * count
        assert model["launches"] >= 12 * count


def test_the_time_of_the_host_beside_a_pass_is_not_predicted_to_count() -> None:
    runs = simulate(SMALL, CARDS["h100"], max_batch=32, runs=2, seed=0, async_scheduling=True)
    for run in runs:
        passes = sum(sum(model["passes"].values()) for model in run["models"].values())
        assert run["ticks"] + run["mixed_ticks"] == pytest.approx(passes, abs=4)  # some were for nobody
        assert run["ticks"] / 4 < run["ahead_ticks"] < run["ticks"]
        assert 0 < run["host_hidden_s"] < run["host_s"] and run["floor_s"] <= run["predicted_s"]


def test_what_a_pass_reads_travels_to_the_device_in_one_copy(runs: list[dict[str, Any]]) -> None:
    """A step of both kinds makes two passes; one that draws at the ends of known prompts copies their seeds."""
    for run in runs:
        passes = sum(sum(model["passes"].values()) for model in run["models"].values())
        assert passes <= run["copies_to_device"] <= 2 * run["ticks"]


def test_heads_may_be_wider_than_their_share_of_the_states() -> None:
    """As Qwen3-0.6B's: keys and scores are those of twice as many heads of the usual width."""
    narrow = ModelShape(28, 1024, 3072, 16, 8, 151936)
    one = {"levels": 1, "rows": 8, "tokens": 8, "seconds": 0.0}
    passes = [Pass("policy", "replayed", keys=keys, scores=scores, **one) for keys, scores in ((0, 0), (900, 7000))]
    of_keys, of_scores = [], []
    for shape in (narrow, replace(narrow, head_dim=128)):
        without, with_keys = (_Work.of(each, shape, (37, 10), CARDS["h100"]) for each in passes)
        of_keys.append(with_keys.bytes - without.bytes)
        of_scores.append(with_keys.flops - without.flops)
    assert of_keys == [900 * 2 * 28 * 8 * 64 * 2, 900 * 2 * 28 * 8 * 128 * 2]
    assert of_scores == [4 * 28 * 16 * 64 * 7000, 4 * 28 * 16 * 128 * 7000]


def test_operations_are_those_of_the_model() -> None:
    """A Llama layer has two norms, four products around attention, rotary embeddings, three products of the MLP."""
    layer, rest = operations(ModelShape(32, 4096, 14336, 32, 8, 128256))
    assert 25 <= layer <= 45 and 5 <= rest <= 25
    assert [attention_operations(levels) for levels in (1, 2, 3)] == [3, 6, 8]


def test_the_command_writes_what_it_prints(tmp_path: Path) -> None:
    out = tmp_path / "simulation.json"
    app(["--simulate", "h200", "--quick", "--max-batch", "8", "--json", str(out)], standalone_mode=False)
    document = json.loads(out.read_text())
    assert document["run"]["card"]["name"] == "H200 SXM 141 GB" and len(document["results"]) == 2
    with pytest.raises(typer.BadParameter, match="card 'b7'"):
        app(["--simulate", "b7", "--quick"], standalone_mode=False)
