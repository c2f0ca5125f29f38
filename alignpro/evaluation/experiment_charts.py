"""The charts of an experiment's analyses: reward against KL, against target calls, iterations, another reward; transfer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from alignpro.evaluation.figure_style import LINES, new_figure, save_figure
from alignpro.theory.statistics import Estimate

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class FrontierPoint:
    """Where a method stands between reward and KL."""

    label: str
    kl: Estimate
    """Nats per sequence."""
    reward: Estimate


def plot_reward_against_kl(
    series: Mapping[str, Sequence[FrontierPoint]],
    baseline: float | None,
    path: Path | IO[bytes],
    *,
    format: str | None = None,
) -> bool:
    """Plot the mean reward against the KL to the prompter before training, with 95 % intervals of both.

    Args:
        series: Name → its points, which are joined in the order of their KL; any names.
        baseline: The mean reward of no fine-tuning, drawn as a line; None if it is not known.
        path: Where to write; the suffix determines the format.
        format: The format, if ``path`` is a stream.

    Returns:
        Whether there was anything to draw; if not, nothing is written.
    """
    if not any(series.values()):
        return False
    with new_figure((6.4, 4.0)) as figure:
        axes = figure.subplots()
        for i, (name, points) in enumerate(series.items()):
            ordered = sorted(points, key=lambda point: point.kl.value)
            axes.errorbar(
                [point.kl.value for point in ordered],
                [point.reward.value for point in ordered],
                xerr=_arms([point.kl for point in ordered]),
                yerr=_arms([point.reward for point in ordered]),
                color=LINES[i % len(LINES)],
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=5,
                elinewidth=0.8,
                capsize=2,
                label=name,
            )
        if baseline is not None:
            axes.axhline(baseline, color="#777777", linestyle=":", label="No fine-tuning")
        axes.set_xlabel("KL to the prompter before training (nats per sequence)")
        axes.set_ylabel("mean reward")
        figure.legend(loc="outside lower center", ncols=2)
        save_figure(figure, path, format)
    return True


@dataclass(frozen=True)
class CallCurve:
    """A reward after numbers of responses of the target."""

    calls: Sequence[float]
    reward: Sequence[float]
    steps: bool = False
    """Whether it stays until the next number, as a best so far does."""


def plot_reward_against_calls(
    curves: Mapping[str, CallCurve], path: Path | IO[bytes], *, format: str | None = None
) -> bool:
    """Plot what methods reach after how many responses of the target.

    Args:
        curves: Name of a method → its curve.
        path: Where to write; the suffix determines the format.
        format: The format, if ``path`` is a stream.

    Returns:
        Whether there was anything to draw; if not, nothing is written.
    """
    drawn = {name: curve for name, curve in curves.items() if len(curve.calls)}
    if not drawn:
        return False
    with new_figure((6.4, 3.6)) as figure:
        axes = figure.subplots()
        for i, (name, curve) in enumerate(drawn.items()):
            axes.plot(
                curve.calls,
                curve.reward,
                color=LINES[i % len(LINES)],
                drawstyle="steps-post" if curve.steps else "default",
                marker=_MARKERS[i % len(_MARKERS)] if len(curve.calls) < 12 else None,
                markersize=4,
                label=name,
            )
        axes.set_xlabel("responses of the target")
        axes.set_ylabel("reward")
        axes.set_xlim(left=0)
        figure.legend(loc="outside lower center", ncols=2)
        save_figure(figure, path, format)
    return True


def plot_reward_over_iterations(
    series: Mapping[str, Sequence[tuple[int, Estimate]]], path: Path | IO[bytes], *, format: str | None = None
) -> bool:
    """Plot the mean reward after each iteration of a training, with 95 % intervals.

    Args:
        series: Name → number of the iteration, 0 before the first, and mean reward.
        path: Where to write; the suffix determines the format.
        format: The format, if ``path`` is a stream.

    Returns:
        Whether there was anything to draw; if not, nothing is written.
    """
    if not any(series.values()):
        return False
    with new_figure((6.4, 3.8)) as figure:
        axes = figure.subplots()
        for i, (name, points) in enumerate(series.items()):
            axes.errorbar(
                [iteration + 0.04 * (i - (len(series) - 1) / 2) for iteration, _ in points],  # intervals side by side
                [reward.value for _, reward in points],
                yerr=_arms([reward for _, reward in points]),
                color=LINES[i % len(LINES)],
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=5,
                elinewidth=0.8,
                capsize=2,
                label=name,
            )
        axes.set_xticks(sorted({iteration for points in series.values() for iteration, _ in points}))
        axes.set_xlabel("iteration")
        axes.set_ylabel("mean reward on held-out prompts")
        figure.legend(loc="outside lower center", ncols=2)
        save_figure(figure, path, format)
    return True


@dataclass(frozen=True)
class ParetoPoint:
    """Where a prompter stands between two rewards."""

    weight: float
    """Of the second."""
    first: Estimate
    second: Estimate


def plot_pareto(
    series: Mapping[str, Sequence[ParetoPoint]],
    names: tuple[str, str],
    path: Path | IO[bytes],
    *,
    format: str | None = None,
) -> bool:
    """Plot one mean reward against another, with 95 % intervals of both.

    Args:
        series: Name → its points in the order of their weights, which joins them.
        names: Of both rewards.
        path: Where to write; the suffix determines the format.
        format: The format, if ``path`` is a stream.

    Returns:
        Whether there was anything to draw; if not, nothing is written.
    """
    if not any(series.values()):
        return False
    with new_figure((5.2, 4.2)) as figure:
        axes = figure.subplots()
        for i, (name, points) in enumerate(series.items()):
            axes.errorbar(
                [point.first.value for point in points],
                [point.second.value for point in points],
                xerr=_arms([point.first for point in points]),
                yerr=_arms([point.second for point in points]),
                color=LINES[i % len(LINES)],
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=5,
                elinewidth=0.6,
                capsize=2,
                label=name,
            )
            for point in points:
                axes.annotate(
                    f"{point.weight:.3g}",
                    (point.first.value, point.second.value),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=7,
                )
        axes.set_xlabel(f"mean reward of {names[0]}")
        axes.set_ylabel(f"mean reward of {names[1]}")
        figure.legend(loc="outside lower center", ncols=2)
        save_figure(figure, path, format)
    return True


def plot_transfer(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[str, str], Estimate],
    label: str,
    path: Path | IO[bytes],
    *,
    format: str | None = None,
) -> bool:
    """Plot a heat map: what was trained on each target, evaluated on each; every field has its 95 % interval.

    Args:
        rows: Names of the targets of training, or of what was not trained on one.
        columns: Names of the targets of the evaluation.
        values: (row, column) → its value; those that are missing are empty.
        label: What the values are.
        path: Where to write; the suffix determines the format.
        format: The format, if ``path`` is a stream.

    Returns:
        Whether there was anything to draw; if not, nothing is written.
    """
    if not values:
        return False
    table = np.full((len(rows), len(columns)), math.nan)
    for (row, column), each in values.items():
        table[rows.index(row), columns.index(column)] = each.value
    # White is 0 in a map of gains: colours tell gains from losses.
    largest = float(np.nanmax(np.abs(table))) or 1.0
    with new_figure((2.2 + 1.45 * len(columns), 1.3 + 0.62 * len(rows))) as figure:
        axes = figure.subplots()
        image = axes.imshow(table, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel("evaluated on")
        axes.set_ylabel("trained on")
        axes.grid(False)
        for (row, column), each in values.items():
            place = (columns.index(column), rows.index(row))
            known = math.isfinite(each.low) and math.isfinite(each.high)
            interval = f"\n[{each.low:.3f}, {each.high:.3f}]" if known else ""
            dark = abs(each.value) > 0.6 * largest
            axes.annotate(
                f"{each.value:+.3f}{interval}",
                place,
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "#222222",
            )
        figure.colorbar(image, ax=axes, label=label)
        save_figure(figure, path, format)
    return True


def _arms(estimates: Sequence[Estimate]) -> np.ndarray:
    """(2, n): how far intervals reach below and above their values; 0 where there is none."""
    below = [each.value - each.low if math.isfinite(each.low) else 0.0 for each in estimates]
    above = [each.high - each.value if math.isfinite(each.high) else 0.0 for each in estimates]
    return np.maximum(np.array([below, above]), 0.0)
