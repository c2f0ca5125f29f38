"""The engine benchmark: all entrants generate equal lengths, and their times are compared with the floor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from benchmarks.engine import ours, peers
from benchmarks.engine.__main__ import app
from benchmarks.engine.cases import CASES, Case, make_inputs, shrink
from benchmarks.engine.entrant import Entrant, Generated, Run, Setting
from benchmarks.engine.floor import DeviceRates, floor_seconds
from benchmarks.engine.measure import compare

SETTING = Setting(torch.device("cpu"), torch.float32, max_batch=256, seed=0)
RATES = DeviceRates(1e9, 1e9)


def case(name: str) -> Case:
    """Return a case by name."""
    return next(one for one in CASES if one.name == name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the quick workloads of chains and of sequences."""
    out = tmp_path_factory.mktemp("engine")
    options = ["--quick", "--workload", "bare", "--workload", "decode256", "--device", "cpu"]
    app([*options, "--json", str(out / "engine.json")], standalone_mode=False)
    return out


@pytest.fixture(scope="module")
def document(folder: Path) -> Any:
    return json.loads((folder / "engine.json").read_text())


def test_every_case_lists_every_entrant_with_a_reason_if_not_measured(document: Any) -> None:
    assert [result["case"] for result in document["results"]] == ["bare", "decode256"]
    for result in document["results"]:
        assert [e["entrant"] for e in result["entrants"]] == ["ours", "hf-generate", "hf-continuous"]
        for entrant in result["entrants"]:
            assert entrant["status"] == "measured" or entrant["reason"], entrant
        assert all(e["status"] == "measured" for e in result["entrants"][:2])


def test_a_measured_entrant_has_rates_and_ratios_to_the_floor_and_to_ours(document: Any) -> None:
    for result in document["results"]:
        seconds = {e["entrant"]: e["seconds"] for e in result["entrants"]}
        for entrant in result["entrants"]:
            if entrant["status"] != "measured":
                continue
            assert len(entrant["rounds"]) == document["run"]["rounds"] == 1
            assert entrant["ratio_to_floor"] == pytest.approx(entrant["seconds"] / sum(result["floor"].values()))
            assert entrant["ours_over_it"] == pytest.approx(entrant["seconds"] / seconds["ours"])


def test_ours_reports_tokens_computed_and_the_share_of_host_time(document: Any) -> None:
    chains, sequences = document["results"]
    for result in document["results"]:
        details = result["entrants"][0]["details"]
        assert details["computed_over_floor"] == 1.0  # the only common prefixes are whole prompts
        assert 0 < details["host_share"] < 1
    assert "decode_ticks" not in chains
    assert 0 < sequences["decode_ticks"]["host_s"] < sequences["decode_ticks"]["tick_s"]


def test_the_run_is_described_and_plotted(document: Any, folder: Path) -> None:
    run = document["run"]
    assert run["command"].startswith("python -m benchmarks.engine")
    assert run["rates"].keys() == {"bytes_per_s", "flops_per_s"}
    assert run["versions"]["transformers"]
    assert (folder / "engine.png").read_bytes().startswith(b"\x89PNG")


def test_an_entrant_that_generates_less_has_failed() -> None:
    def short(case: Case, *_: object) -> Run:
        return lambda turn: Generated({"target": case.expected["target"] - 1})

    small = shrink(case("single"))
    (result,) = compare(small, [Entrant("short", short)], SETTING, 1, RATES)["entrants"]
    assert result["status"] == "failed"
    assert "instead of" in result["reason"]


def test_a_failing_entrant_does_not_affect_the_others() -> None:
    def broken(*_: object) -> Run:
        raise ValueError("no such device\nand more")

    small = shrink(case("single"))
    results = compare(small, [Entrant("broken", broken), ours.entrant()], SETTING, 1, RATES)["entrants"]
    assert [result["status"] for result in results] == ["failed", "measured"]
    assert results[0]["reason"] == "ValueError: no such device"


def test_entrants_have_the_same_weights() -> None:
    small = shrink(case("single"))
    w = replace(small.workload, response=4)
    inputs = make_inputs(small, 0)
    for entrant in (ours.entrant(), *peers.entrants()[:1]):
        assert entrant.prepare(replace(small, workload=w), inputs, SETTING)(1).tokens == {"target": 4}


def test_floor_of_a_single_sequence_is_reading_the_weights_once_per_token() -> None:
    single = case("single")
    shape, new = single.workload.target, single.workload.response
    layer = 2 * 384 * 384 + 2 * 384 * 192 + 3 * 384 * 1152
    weights = 6 * layer + 259 * 384
    seconds = floor_seconds(single, DeviceRates(1e9, 1e15), torch.float32)["decode"]
    kv = 2 * 6 * 192 * 4 * sum(64 + drawn for drawn in range(1, new))
    assert seconds == pytest.approx(((new - 1) * 4 * weights + kv) / 1e9)
    assert shape.kv_heads * shape.hidden // shape.heads == 192


def test_floor_of_many_sequences_is_their_matrix_products() -> None:
    many = case("decode256")
    slow_products = floor_seconds(many, DeviceRates(1e15, 1e9), torch.float32)["decode"]
    one = replace(many, workload=replace(many.workload, prompts=1))
    assert slow_products == pytest.approx(256 * floor_seconds(one, DeviceRates(1e15, 1e9), torch.float32)["decode"])


def test_models_for_a_gpu_are_refused_on_a_cpu() -> None:
    with pytest.raises(typer.BadParameter, match="gpu"):
        app(["--workload", "gpu", "--device", "cpu"], standalone_mode=False)
