"""The training benchmark on a model directory: its template, prompts of a file, a LoRA for all entrants, a floor by dtype."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from tiny_gguf import bpe_tokenizer, tiny_model

from benchmarks.engine.floor import DeviceRates
from benchmarks.training.__main__ import app
from benchmarks.training.floor import step_floor
from benchmarks.training.given import workload_of
from benchmarks.training.ours import configure
from benchmarks.training.task import make_task_of

QUICK = ("--quick", "--steps", "1", "--warmup", "1", "--threads", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(directory)
    bpe_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("the fox", "what is 12 + 34?", "quick")))
    return file


def run(file: Path, *options: str) -> Any:
    app([*QUICK, "--json", str(file), *options], standalone_mode=False)
    return json.loads(file.read_text())


def test_a_step_of_a_real_model_is_measured(model: Path, prompts: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.json"
    options = ("--model", str(model), "--prompts", str(prompts), "--lora", "4", "--peers", "none")
    document = run(file, *options)
    assert document["ours"]["status"] == "measured"
    assert document["peak_bytes"] > 100e6  # torch alone takes more
    assert document["workload"]["chains"] == 4 and document["workload"]["name"] == "tiny"
    assert list(document["floor_by_dtype"]) == ["float32", "bfloat16"]
    for parts in document["floor_by_dtype"].values():
        assert min(parts["rollout"], parts["learn"]) > 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
@pytest.mark.parametrize("adapter", [("--lora", "4"), ()])
def test_trl_trains_the_same_model(adapter: tuple[str, ...], model: Path, prompts: Path, tmp_path: Path) -> None:
    document = run(tmp_path / "tiny.json", "--model", str(model), "--prompts", str(prompts), *adapter)
    trl = document["trl"]
    assert trl["status"] == "measured", trl
    assert sum(trl["phases"].values()) == pytest.approx(trl["step_s"])
    assert all(seconds > 0 for seconds in trl["phases"].values())
    assert trl["tokens"]["update"] == trl["tokens"]["credit"]
    assert document["ratio"] is not None


def test_both_models_are_the_directory_and_prompts_repeat(model: Path, prompts: Path, tmp_path: Path) -> None:
    what = workload_of(model, ["prompts=2"], quick=True)
    task = make_task_of(model, what, tmp_path, ["the fox", "quick", "over"], steps=2, seed=0, lora=4)
    assert task.prompts == ["the fox", "quick", "over", "the fox"]
    config = configure(task, torch.device("cpu"))
    assert config.policy.path == config.target.path == str(model)  # type: ignore[union-attr]
    assert (config.policy.adapter.kind, config.policy.adapter.rank) == ("lora", 4)
    assert yaml.safe_load(next(tmp_path.glob("*.yaml")).read_text())["rollout"]["respond"] == {"max_tokens": 4}


def test_random_prompts_have_no_special_tokens(model: Path, tmp_path: Path) -> None:
    what = workload_of(model, [], quick=True)
    task = make_task_of(model, what, tmp_path, [], steps=3, seed=0, lora=None)
    assert len(set(task.prompts)) == 6
    assert not any("<|" in text for text in task.prompts)


def test_the_floor_of_learning_counts_the_products(model: Path) -> None:
    what = workload_of(model, ["prompts=1", "K=1", "prompt=10", "rewrite=10"], quick=True)
    rates = DeviceRates(1e15, 1.0)
    layers = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    head = what.target.vocabulary * 32
    assert step_floor(what, rates, torch.float32, lora=True)["learn"] == 2 * 3 * (layers * 20 + head * 10)
    assert step_floor(what, rates, torch.float32, lora=False)["learn"] == 2 * 4 * (layers * 20 + head * 10)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--lora", "4"], "give --model too"),
        (["--model", "nowhere"], "is not a directory with a model"),
        (["--model", "MODEL", "--workload", "bare"], "workload 'bare': has models of its own"),
        (["--model", "MODEL", "--shape", "template=4"], "template and meta-prompt are those of its directory"),
    ],
)
def test_impossible_options_are_named(options: list[str], reason: str, model: Path) -> None:
    with pytest.raises(typer.BadParameter, match=reason):
        app([*QUICK, *(str(model) if option == "MODEL" else option for option in options)], standalone_mode=False)
