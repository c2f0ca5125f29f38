"""The kernel benchmark: the files that it writes, and its detection of wrong results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alignpro_kernels import backends
from benchmarks.kernels import peers, plain
from benchmarks.kernels.__main__ import app
from benchmarks.kernels.cases import CASES, SAMPLE_BATCHES
from benchmarks.kernels.compare import Limits, compare
from benchmarks.kernels.correctness import TOLERANCE
from benchmarks.kernels.entrant import Entrant, Outcome, Run, Setting
from benchmarks.kernels.memory import MIB, peak_extra_bytes
from benchmarks.kernels.problem import Problem, make_heads
from benchmarks.kernels.shapes import SHAPES, Shape, default_rows, parse_shape
from benchmarks.measure import SkippedError

TINY = Shape("24x331", 24, 331)
CPU = torch.device("cpu")
# Compilers take tens of seconds per case.
SLOW = {"compile", "cce-compile"}


def every_entrant() -> list[str]:
    return [f"ours-{name}" for name in backends()] + [e.name for e in (*plain.entrants(), *peers.entrants())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the benchmark on a tiny head with a soft cap."""
    out = tmp_path_factory.mktemp("kernels")
    chosen = [word for name in every_entrant() if name not in SLOW for word in ("--entrants", name)]
    options = ["--quick", "--shape", "24x331:30", "--rows", "19", "--device", "cpu", "--out", str(out)]
    app([*options, *chosen], standalone_mode=False)
    return out


@pytest.fixture(scope="module")
def document(folder: Path) -> Any:
    return json.loads((folder / "kernels.json").read_text())


def test_every_case_lists_every_entrant_with_a_reason_if_not_measured(document: Any) -> None:
    assert [result["case"]["name"] for result in document["results"]] == [case.name for case in CASES]
    expected = [name for name in every_entrant() if name not in SLOW]
    for result in document["results"]:
        assert [entrant["entrant"] for entrant in result["entrants"]] == expected
        for entrant in result["entrants"]:
            assert entrant["status"] in ("measured", "skipped"), entrant
            assert entrant["status"] == "measured" or entrant["reason"], entrant


def test_every_measured_entrant_agrees_with_the_reference_in_float64(document: Any) -> None:
    for result in document["results"]:
        assert result["reference_dtype"] == "float64"
        sampled = result["case"]["operator"] == "linear_sample"
        for entrant in result["entrants"]:
            if entrant["status"] != "measured" or entrant["entrant"] == "naive-token":
                continue
            off = {name: value for name, value in entrant["deviation"].items() if name != "sigmas"}
            assert {"logprob", "entropy"} <= off.keys() if sampled else {"value", "value_at_size"} <= off.keys()
            assert max(off.values()) < TOLERANCE[torch.float32], (result["case"]["name"], entrant)


def test_our_backends_that_run_are_measured_in_every_case(document: Any) -> None:
    running = {f"ours-{name}" for name, reason in backends().items() if reason is None}
    assert "ours-reference" in running
    for result in document["results"]:
        measured = {e["entrant"] for e in result["entrants"] if e["status"] == "measured"}
        assert running <= measured


def test_a_measured_entrant_has_times_ratios_and_memory(document: Any) -> None:
    for result in document["results"]:
        assert result["floor"]["seconds"] > 0
        for entrant in result["entrants"]:
            if entrant["status"] != "measured":
                continue
            assert 0 < entrant["forward_seconds"] <= entrant["total_seconds"]
            assert entrant["ratio_to_floor"] > 0
            assert entrant["ratio_to_naive"] > 0
            assert entrant["peak_extra_mib"] is None or entrant["peak_extra_mib"] >= 0
            assert len(entrant["rounds"]) == 2


def test_memory_of_gradients_is_counted_separately(document: Any) -> None:
    hidden, weight = 19 * 24 * 4 / MIB, 331 * 24 * 4 / MIB
    for result in document["results"]:
        case = next(case for case in CASES if case.name == result["case"]["name"])
        wanted = (hidden + (weight if case.trained else 0)) if case.backward else 0
        held = [e["gradients_mib"] for e in result["entrants"] if e["status"] == "measured"]
        assert held == pytest.approx([wanted] * len(held))


def test_run_is_described(document: Any) -> None:
    (run,) = document["runs"]
    assert run["device"]["type"] == "cpu"
    assert run["dtype"] == "float32"
    assert run["versions"]["torch"] == torch.__version__
    assert {"command", "date", "threads", "seed", "limits"} <= run.keys()


def test_the_plot_is_written(folder: Path) -> None:
    assert (folder / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_floor_counts_the_necessary_matrix_products() -> None:
    units = {case.name: 2 * len(case.products) for case in CASES if case.operator != "linear_sample"}
    assert units == {
        "policy": 6,
        "policy-frozen": 4,
        "policy-kl-frozen": 6,
        "policy-kl": 8,
        "cross-entropy": 6,
        "logprob-forward": 2,
        "logprob": 8,
    }
    assert [case.batch for case in CASES if case.operator == "linear_sample"] == list(SAMPLE_BATCHES)


def measure(case_name: str, forward: Any) -> dict[str, Any]:
    """Measure a made-up entrant together with the naive one."""
    case = next(case for case in CASES if case.name == case_name)
    entrant = Entrant("made-up", "made-up", lambda case, setting: Run(forward, "nonsense"))
    heads = make_heads(TINY, CPU, torch.float32, 0, reference=False)
    setting = Setting(CPU, torch.float32, TINY)
    result = compare(case, [entrant, plain.entrants()[0]], setting, heads, 16, 1, Limits(rounds=1, seconds=1))
    made_up, naive = result["entrants"]
    assert naive["status"] == "measured"
    return dict(made_up)


def naive_loss(problem: Problem) -> torch.Tensor:
    logp = (problem.hidden @ problem.weight.T).log_softmax(-1)
    return (problem.alpha * logp.gather(-1, problem.target.unsqueeze(-1)).squeeze(-1)).sum()


def test_a_wrong_gradient_is_reported() -> None:
    def wrong(problem: Problem) -> Outcome:
        loss = naive_loss(problem)
        return Outcome(2 * loss - loss.detach())

    result = measure("policy", wrong)
    assert result["status"] == "wrong"
    assert "d_hidden" in result["reason"]


def test_an_error_at_full_size_only_is_reported() -> None:
    calls = 0

    def wrong(problem: Problem) -> Outcome:
        nonlocal calls
        calls += 1  # the first call has the selected rows, the later ones all rows
        loss = naive_loss(problem)
        return Outcome(loss if calls == 1 else loss + problem.hidden[-1].sum())

    result = measure("policy", wrong)
    assert result["status"] == "wrong"
    assert "at_size" in result["reason"]


def test_a_sampler_with_another_distribution_is_reported() -> None:
    def uniform(problem: Problem) -> Outcome:
        return Outcome(torch.randint(TINY.vocabulary, (problem.rows,)))

    result = measure("sample-64", uniform)
    assert result["status"] == "wrong"
    assert "sigma" in result["reason"]


def test_a_failing_entrant_does_not_affect_the_others() -> None:
    def broken(problem: Problem) -> Outcome:
        raise ValueError("no such kernel\nand more")

    result = measure("policy", broken)
    assert result["status"] == "failed"
    assert result["reason"] == "ValueError: no such kernel"


def test_append_keeps_other_cases(tmp_path: Path) -> None:
    options = ["--quick", "--shape", "24x331", "--device", "cpu", "--out", str(tmp_path), "--entrants", "naive"]
    for case in ("policy", "policy-frozen", "policy"):
        app([*options, "--append", "--cases", case], standalone_mode=False)
    document = json.loads((tmp_path / "kernels.json").read_text())
    assert [(r["case"]["name"], r["run"]) for r in document["results"]] == [("policy-frozen", 1), ("policy", 2)]
    assert len(document["runs"]) == 3


def test_peak_of_an_allocation_is_found() -> None:
    peak = peak_extra_bytes(lambda: torch.ones(48 * MIB // 4).sum(), CPU)
    if peak is None:
        pytest.skip("the resident memory's high-water mark cannot be reset here")
    assert 0.95 * 48 * MIB < peak < 1.25 * 48 * MIB


def test_shapes_by_name_and_by_size() -> None:
    assert parse_shape("all") == SHAPES
    assert parse_shape("Gemma-2-2B")[0].softcap == 30
    assert parse_shape("64x1000") == (Shape("64x1000", 64, 1000),)
    assert parse_shape("64x1000:2.5") == (Shape("64x1000:2.5", 64, 1000, 2.5),)
    with pytest.raises(ValueError, match="0x5"):
        parse_shape("0x5")
    assert all(32 <= default_rows(shape, "cpu")[0] <= 1024 for shape in SHAPES)


def test_every_case_can_be_prepared_by_every_peer() -> None:
    setting = Setting(CPU, torch.float32, TINY)
    for entrant in peers.entrants():
        for case in CASES:
            try:
                prepared: Any = entrant.prepare(case, setting)
            except SkippedError as error:
                prepared = error
            assert isinstance(prepared, Run) or str(prepared)


@pytest.mark.slow
def test_compiled_entrants_agree_too(tmp_path: Path) -> None:
    options = ["--quick", "--shape", "24x331", "--device", "cpu", "--out", str(tmp_path), "--cases", "policy*"]
    app([*options, "--entrants", "compile", "--entrants", "cce-compile"], standalone_mode=False)
    for result in json.loads((tmp_path / "kernels.json").read_text())["results"]:
        assert {e["status"] for e in result["entrants"]} <= {"measured", "skipped"}
