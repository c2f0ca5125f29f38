"""docs/engine.md is correct: its tables match the code, and everything it names exists."""

from __future__ import annotations

import inspect
import re

from document import ROOT, Document, recorded
from tiny_models import ARCHITECTURES

from alignpro.config import EngineConfig
from alignpro.engine import Engine, EngineStats
from alignpro_kernels.attention import BACKENDS

DOCUMENT = Document("engine.md")


def test_every_module_of_the_engine_is_in_the_table() -> None:
    told = {re.sub(r"\[(.*)\].*", r"\1", cells[0]) for cells in DOCUMENT.rows("Who owns what")}
    assert told == {path.name for path in (ROOT / "alignpro" / "engine").glob("*.py")} - {"__init__.py"}


def test_every_backend_of_attention_is_in_the_table() -> None:
    assert {cells[0] for cells in DOCUMENT.rows("Attention")} == set(BACKENDS)


def test_every_metric_is_in_the_table() -> None:
    stats = EngineStats()
    stats.peak_pages["<model>"] = stats.decode_ticks["<how>"] = 1
    told = [name.strip("` ") for cells in DOCUMENT.rows("Statistics") for name in cells[0].split(",")]
    assert told == list(stats.metrics())


def test_every_setting_is_in_the_table_with_its_default() -> None:
    told = {cells[0]: cells[1] for cells in DOCUMENT.rows("Memory")}
    defaults = EngineConfig().model_dump()
    assert told == {name: "" if value is None else str(value) for name, value in defaults.items()}


def test_every_architecture_is_named() -> None:
    (sentence,) = re.findall(r"^There now: (.*)\.$", DOCUMENT.text, flags=re.MULTILINE)
    assert tuple(re.findall(r"`(\w+)`", sentence)) == ARCHITECTURES


def test_every_call_is_in_the_first_table() -> None:
    table = DOCUMENT.text.split("\n## ")[0]
    calls = {name for name, value in vars(Engine).items() if inspect.isfunction(value) and not name.startswith("_")}
    assert {name for name in re.findall(r"`(\w+)\(", table) if name != "to_target"} == calls


def test_figures_match_the_recorded_results() -> None:
    def digits(value: float) -> str:
        return f"{value:.0f}" if value >= 100 else f"{value:.1f}"

    expected = []
    for workload in ("paper", "bare"):
        found = recorded(f"training_{workload}")
        ours, peer = (found[name]["chains_per_s"] for name in ("ours", "trl"))
        expected.append([digits(ours), "", f"{digits(peer)} ({found['ratio']:.1f} ×)"])
    for case in recorded("engine")["results"]:
        ours, peer = case["entrants"]
        ratio = f"{digits(peer['sequences_per_s'])} ({peer['ours_over_it']:.1f} ×)"
        expected.append([digits(ours["sequences_per_s"]), ratio, ""])
    assert [cells[1:] for cells in DOCUMENT.rows("Benchmarks")] == expected


def test_the_figures_of_bfloat16_are_the_recorded_ones() -> None:
    document = recorded("cpu_dtype")
    wide, narrow = document["speed"]["results"]
    assert (wide["dtype"], narrow["dtype"]) == ("float32", "bfloat16")
    steps = [(f"{1e3 * narrow[key]:.0f}", f"{1e3 * wide[key]:.0f}") for key in ("step_1", "step_8", "step_32")]
    (one, eight, more), text = steps, " ".join(DOCUMENT.text.split())
    assert f"takes {one[0]} instead of {one[1]} ms with one sequence, {eight[0]} instead of {eight[1]} with 8" in text
    assert f"and {more[0]} instead of {more[1]} with 32" in text
    assert f"grows by {narrow['model_bytes'] / 2**20:.0f} instead of {wide['model_bytes'] / 2**20:,.0f} MiB" in text
    errors = {row["computed by"]: row["mean error"] for row in document["accuracy"]["results"]}
    ours, theirs = errors["ours, bfloat16"], errors["transformers, bfloat16"]
    assert f"off by {ours:.3f} nats on average, and {theirs:.3f} in transformers' bfloat16" in text


def test_the_figures_of_amx_are_the_recorded_ones() -> None:
    document, text = recorded("cpu_dtype_amx"), " ".join(DOCUMENT.text.split())
    steps = [[1e3 * row[key] for key in ("step_1", "step_8", "step_32")] for row in document["speed"]["results"]]
    (a, b, c), (one, eight, more) = steps
    assert f"takes {one:.0f} ms with one sequence, {eight:.0f} with 8 and {more:.0f} with 32, where float32" in text
    assert f"where float32 takes {a:.0f}, {b:.0f} and {c:.0f}." in text
    (found,) = (row for row in document["accuracy"]["results"] if row["computed by"] == "ours, bfloat16")
    (widened,) = (row for row in recorded("cpu_dtype")["accuracy"]["results"] if row["computed by"] == "ours, bfloat16")
    assert abs(found["mean error"] - widened["mean error"]) < 1e-4
    assert max(found["sampler KL before"], found["sampler KL after"]) < 1e-9
    assert f"has a cosine of {found['gradient cosine']:.6f} with" in text


def test_the_figures_beside_busy_processes_are_the_recorded_ones() -> None:
    (case,) = recorded("engine_busy")["results"]
    (ours,) = case["entrants"]
    busy, text = ours["busy"], " ".join(DOCUMENT.text.split())
    assert busy["processes"] == 7
    assert (
        f"kept {busy['over_fair_share']:.2f} of it, {busy['tokens_per_s']:.0f} of {ours['tokens_per_s']:.0f} tokens/s"
        in text
    )
