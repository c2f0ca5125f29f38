"""One case on one shape: check every entrant, measure its memory, then time all of them in turns with the floor."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from alignpro_kernels import BackendError
from benchmarks.kernels.cases import Case
from benchmarks.kernels.clock import Clock, Seconds
from benchmarks.kernels.correctness import Expected, ExpectedSample, check, check_at_size, expect, gradients
from benchmarks.kernels.entrant import Entrant, Run, Setting, Skip
from benchmarks.kernels.floor import Floor, flops
from benchmarks.kernels.memory import MIB, peak_extra_bytes
from benchmarks.kernels.problem import Heads, Problem, make_problem

LEAST_ROUNDS = 3
MEASUREMENT_SECONDS = 5e-3  # a measurement repeats a shorter case, so that the start-up time is negligible
MOST_CALLS = 50


@dataclass
class Result:
    """The result of an entrant in a case. Ratios are taken within a round, to the floor measured next to the entrant."""

    entrant: str
    title: str
    status: Literal["measured", "wrong", "failed", "skipped"]
    reason: str | None = None
    quantity: str | None = None
    forward_seconds: float | None = None
    total_seconds: float | None = None
    """Medians; forward and backward together."""
    ratio_to_floor: float | None = None
    ratio_to_naive: float | None = None
    peak_extra_mib: float | None = None
    """Peak memory beyond inputs and gradients."""
    gradients_mib: float | None = None
    deviation: dict[str, float] = field(default_factory=dict)
    rounds: list[dict[str, float]] = field(default_factory=list)
    """For every round: forward, total and the floor measured next to it, in seconds."""


@dataclass(frozen=True)
class Limits:
    """How long to measure a case: at most ``rounds``, and no new ones after ``seconds`` (but at least three)."""

    rounds: int
    seconds: float


def compare(
    case: Case, entrants: Sequence[Entrant], setting: Setting, heads: Heads, rows: int, seed: int, limits: Limits
) -> dict[str, Any]:
    """Measure one case and return the result, ready for JSON."""
    rows = case.batch or rows
    problem = make_problem(case, setting.shape, heads, rows, seed)
    clock = Clock(setting.device)
    results = [Result(e.name, e.title, "skipped") for e in entrants]
    runs: dict[str, Run] = {}
    for entrant, result in zip(entrants, results, strict=True):
        prepared = entrant.prepare(case, setting)
        if isinstance(prepared, Skip):
            result.reason = prepared.reason
        else:
            result.quantity = prepared.quantity
            runs[entrant.name] = prepared

    expected = expect(case, problem, setting)
    _release(setting.device)
    floor = Floor(case, problem, clock)
    by_name = {result.entrant: result for result in results}
    for name, run in list(runs.items()):
        _examine(case, run, problem, expected, by_name[name])
        if by_name[name].status in ("failed", "skipped"):
            del runs[name]
        _release(setting.device)

    floor_seconds = _rounds(case, runs, problem, clock, floor, by_name, limits)
    _summarise(results)
    median = statistics.median(floor_seconds)
    return {
        "shape": asdict(setting.shape),
        "rows": rows,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "case": {"name": case.name, "title": case.title, "operator": case.operator, "products": case.products},
        "reference_dtype": str(expected.dtype).removeprefix("torch."),
        "floor": {
            "seconds": median,
            "teraflops": flops(case, problem) / median / 1e12,
            "rows_at_once": floor.chunk,
            "trial_seconds": {str(size): seconds for size, seconds in floor.candidates.items()},
            "rounds": floor_seconds,
        },
        "entrants": [asdict(result) for result in results],
    }


def _examine(case: Case, run: Run, problem: Problem, expected: Expected | ExpectedSample, result: Result) -> None:
    """Check correctness on a few rows, then memory and correctness on all rows."""

    def whole() -> None:
        outcome = run.forward(problem)
        grads = gradients(case, problem, outcome)
        kept.append((outcome, grads))

    device = problem.hidden.device
    kept: list[Any] = []
    try:
        deviation = check(case, run, problem, expected)
        result.deviation, result.reason = dict(deviation.values), deviation.wrong
        whole()  # warm-up: compilation and tuning for this size use memory of their own
        kept.clear()
        peak = peak_extra_bytes(whole, device)
        outcome, grads = kept.pop()
        held = sum(g.numel() * g.element_size() for g in grads)
        result.gradients_mib = held / MIB
        result.peak_extra_mib = None if peak is None else max(0, peak - held) / MIB
        if isinstance(expected, Expected):
            deviation = check_at_size(case, problem, outcome, grads, expected)
            result.deviation |= deviation.values
            result.reason = result.reason or deviation.wrong
        result.status = "wrong" if result.reason else "measured"
    except BackendError as error:  # runs on this machine, but not on this device or dtype
        result.status, result.reason = "skipped", str(error)
    except torch.OutOfMemoryError:
        result.status, result.reason = "failed", "out of memory"
    except Exception as error:  # a peer may fail in any way; the reason goes into the results
        result.status, result.reason = "failed", f"{type(error).__name__}: {_first_line(error)}"


def _rounds(
    case: Case,
    runs: dict[str, Run],
    problem: Problem,
    clock: Clock,
    floor: Floor,
    results: dict[str, Result],
    limits: Limits,
) -> list[float]:
    """Time all in turns: the floor, two entrants, the floor, two entrants, ...; each round starts with another entrant.

    If the machine's speed drifts, it affects a floor and the entrants next to it alike.
    """
    names = list(runs)
    calls = _calls(min(floor.candidates.values()))
    floors: list[float] = []
    began = time.monotonic()
    for turn in range(limits.rounds):
        if turn >= LEAST_ROUNDS and time.monotonic() - began > limits.seconds:
            break
        if not names:
            floors.append(clock.time(floor.run, calls=calls).total)
        for pair in _pairs(names[turn % len(names) :] + names[: turn % len(names)] if names else []):
            base = clock.time(floor.run, calls=calls).total
            floors.append(base)
            for name in pair:
                spent = _time(case, runs[name], problem, clock, calls)
                results[name].rounds.append({"forward": spent.forward, "total": spent.total, "floor": base})
    return floors


def _time(case: Case, run: Run, problem: Problem, clock: Clock, calls: int) -> Seconds:
    return clock.time(
        lambda: run.forward(problem),
        (lambda outcome: gradients(case, problem, outcome)) if case.backward else None,
        calls=calls,
    )


def _summarise(results: Sequence[Result]) -> None:
    """Fill in medians over the rounds; ratios are computed within each round first."""
    naive = next((r.rounds for r in results if r.entrant == "naive" and r.rounds), None)
    for result in results:
        if not result.rounds:
            continue
        result.forward_seconds = statistics.median(r["forward"] for r in result.rounds)
        result.total_seconds = statistics.median(r["total"] for r in result.rounds)
        result.ratio_to_floor = statistics.median(r["total"] / r["floor"] for r in result.rounds)
        if naive is not None:
            pairs = zip(result.rounds, naive, strict=True)
            result.ratio_to_naive = statistics.median(mine["total"] / other["total"] for mine, other in pairs)


def _calls(seconds: float) -> int:
    return max(1, min(MOST_CALLS, round(MEASUREMENT_SECONDS / max(seconds, 1e-9))))


def _pairs(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), 2):
        yield names[start : start + 2]


def _release(device: torch.device) -> None:
    """Release unused memory, so that one entrant's leftovers do not reduce another's memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
