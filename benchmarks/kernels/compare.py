"""One case on one shape: check every entrant, measure its memory, then time all of them in turns with the floor."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks import measure
from benchmarks.clock import Clock
from benchmarks.device import dtype_name, empty_cache
from benchmarks.kernels.cases import Case
from benchmarks.kernels.correctness import (
    Expected,
    ExpectedSample,
    check,
    check_at_size,
    describe_error,
    expect,
    gradients,
)
from benchmarks.kernels.entrant import Entrant, Outcome, Run, Setting
from benchmarks.kernels.floor import Floor, flops
from benchmarks.kernels.memory import MIB, peak_extra_bytes
from benchmarks.kernels.problem import Heads, Problem, make_problem

MIN_ROUNDS = 3
MEASUREMENT_SECONDS = 5e-3  # a measurement repeats a shorter case, so that the start-up time is negligible
MAX_CALLS = 50


@dataclass
class Result(measure.Result):
    """The result of an entrant in a case. Ratios are taken within a round, to the floor measured next to the entrant."""

    title: str = ""
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
    expected = expect(case, problem, setting)
    empty_cache(setting.device)
    floor = Floor(case, problem, clock)
    results = [Result(entrant.name, title=entrant.title) for entrant in entrants]
    runs: dict[str, Run] = {}
    for entrant, result in zip(entrants, results, strict=True):
        with result.record_failure():
            run = entrant.prepare(case, setting)
            result.quantity = run.quantity
            _examine(case, run, problem, expected, result)
            runs[entrant.name] = run
        empty_cache(setting.device)

    by_name = {result.entrant: result for result in results}
    floor_seconds = _rounds(case, runs, problem, clock, floor, by_name, limits)
    _summarise(results)
    median = statistics.median(floor_seconds)
    return {
        "shape": asdict(setting.shape),
        "rows": rows,
        "dtype": dtype_name(setting.dtype),
        "case": {"name": case.name, "title": case.title, "operator": case.operator, "products": case.products},
        "reference_dtype": dtype_name(expected.dtype),
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
    outputs: list[tuple[Outcome, tuple[Tensor, ...]]] = []

    def step() -> None:
        outcome = run.forward(problem)
        outputs.append((outcome, gradients(case, problem, outcome)))

    result.deviation = check(case, run, problem, expected)
    step()  # warm-up: compilation and tuning for this size use memory of their own
    outputs.clear()
    peak = peak_extra_bytes(step, problem.hidden.device)
    outcome, grads = outputs.pop()
    gradient_bytes = sum(grad.nbytes for grad in grads)
    result.gradients_mib = gradient_bytes / MIB
    result.peak_extra_mib = None if peak is None else max(0, peak - gradient_bytes) / MIB
    if isinstance(expected, Expected):
        result.deviation |= check_at_size(case, problem, outcome, grads, expected)
    result.reason = describe_error(result.deviation, problem.hidden.dtype)
    result.status = "wrong" if result.reason else "measured"


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
    calls = max(1, min(MAX_CALLS, round(MEASUREMENT_SECONDS / max(min(floor.candidates.values()), 1e-9))))
    floors: list[float] = []
    began = time.monotonic()
    for turn in range(limits.rounds):
        if turn >= MIN_ROUNDS and time.monotonic() - began > limits.seconds:
            break
        names = measure.rotated(list(runs), turn)
        for start in range(0, max(len(names), 1), 2):
            floors.append(clock.time(floor.run, calls=calls).total)
            for name in names[start : start + 2]:
                forward = partial(runs[name].forward, problem)
                backward = partial(gradients, case, problem) if case.backward else None
                seconds = clock.time(forward, backward, calls=calls)
                results[name].rounds.append(seconds._asdict() | {"floor": floors[-1]})
    return floors


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
            result.ratio_to_naive = statistics.median(own["total"] / other["total"] for own, other in pairs)
