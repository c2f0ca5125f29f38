"""Metrics of a step: how they are timed and averaged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite

Metrics = dict[str, float]

EXECUTION_METRICS = ("seconds/", "engine/", "endpoint/", "eval/seconds/", "eval/endpoint/", "sample/logprob_difference")
"""Prefixes of metrics that describe how a step was executed (timings, contents of the engine's cache, requests, rounding), not
its result. These may differ in a run that was interrupted and resumed; on a CPU, all other metrics are bit-identical.
"""


@dataclass(frozen=True)
class Evaluation:
    """Of a model on held-out data."""

    metrics: Metrics = field(default_factory=dict)
    """Named ``eval/…``; none if no data is held out."""
    objective: Sequence[float] = ()
    """J of each prompt, in an order that is the same each time; none where nothing is selected by it."""


class PhaseTimer:
    """Measures the seconds that each phase of a step takes, as metrics ``seconds/<phase>``.

    Args:
        begin: Called with the name of each phase when it begins.
    """

    def __init__(self, begin: Callable[[str], None] | None = None) -> None:
        self.seconds: Metrics = {}
        self._begin = begin

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self._begin is not None:
            self._begin(phase)
        started = time.perf_counter()
        try:
            yield
        finally:
            key = f"seconds/{phase}"
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - started


def mean_of_updates(updates: Sequence[Metrics], max_grad_norm: float) -> Metrics:
    """Mean of each metric, and the share of updates whose gradient was clipped.

    An infinite gradient norm marks a skipped update, which is counted instead of averaged.
    """
    metrics = weighted_mean(updates)
    for name in [each for each in metrics if each.endswith("gradient_norm")]:
        norms = [update[name] for update in updates if isfinite(update[name])]
        metrics[name] = sum(norms) / max(1, len(norms))
        clipped = sum(norm > max_grad_norm for norm in norms)
        metrics[name.replace("gradient_norm", "gradient_clipped")] = clipped / max(1, len(norms))
        if skipped := len(updates) - len(norms):
            metrics[name.replace("gradient_norm", "updates_skipped")] = float(skipped)
    return metrics


def weighted_mean(rows: Sequence[Metrics], weights: Sequence[int] | None = None) -> Metrics:
    """Weighted mean of each metric; all rows have the same metrics."""
    weights = [1] * len(rows) if weights is None else weights
    names = rows[0] if rows else ()
    return {name: sum(row[name] * w for row, w in zip(rows, weights, strict=True)) / sum(weights) for name in names}
