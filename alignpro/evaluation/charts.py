"""The charts of the figure and the report: bars of mean reward and variance (the paper's figure), curves, distributions."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from alignpro.evaluation.figure_style import LINES, STYLE, save_figure
from alignpro.evaluation.results import ArmGroup, ArmSummary

# Okabe & Ito (2008): distinguishable with every common colour blindness. Hatches keep bars distinct in greyscale.
ARM_STYLE: dict[str, tuple[str, str]] = {
    "no_finetuning": ("#9A9A9A", ""),
    "sft_prompter": ("#56B4E9", ".."),
    "gibbs": ("#009E73", "xxxx"),
    "align_pro": ("#0072B2", ""),
    "oracle": ("#E69F00", "////"),
}
_OTHERS = (("#CC79A7", "----"), ("#D55E00", "++++"), ("#F0E442", "||||"), ("#8C6BB1", "----"), ("#A6761D", "++++"))
_GIBBS = (("#99D8C9", "xxxx"), ("#41AE76", "xxxx"), ("#006D2C", "xxxx"))
"""Gibbs with several numbers of candidates, from few to many. Hatches of lines: those of circles make large files."""

_GUARD = "reward/guard/"
"""Prefix of the metrics of drift guards."""
_MOST_POINTS = 400
"""Points of a curve that are drawn."""

# The metrics drawn by default, if the rows have them; other metrics are drawn only on request.
CURVES: dict[str, str] = {
    "reward/mean": "Reward, mean",
    "reward/std": "Reward, standard deviation",
    "eval/reward": "Reward on held-out prompts",
    "kl": "KL to reference (nats per sequence)",
    "eval/kl": "KL on held-out prompts",
    "entropy": "Entropy (nats per token)",
    "sample/length": "Length (tokens)",
    "gradient_norm": "Gradient norm",
    "loss": "Loss",
}


def plot_comparison(groups: Sequence[ArmGroup], path: Path | IO[bytes], *, format: str | None = None) -> None:
    """Plot grouped bars: on the left the mean reward with its 95 % interval, on the right the reward's total variance.

    Args:
        groups: One group of bars per prompter-target pair, in drawing order. Every arm in any group gets a colour and a
            legend entry, in order of first appearance.
        path: Where to write; the suffix determines the format (.png, .svg, .pdf).
        format: The format, if ``path`` is a stream.

    Raises:
        ValueError: There is no group, or a group has no arms.
    """
    if not groups or any(not group.arms for group in groups):
        raise ValueError("plot_comparison needs at least one group, and at least one arm in each")
    labels = {arm.name: arm.label for group in groups for arm in group.arms}
    styles = _arm_styles(list(labels))
    slots = sum(len(group.arms) + 1 for group in groups)
    with style.context(STYLE):
        figure = Figure(figsize=(min(max(6.4, 2.4 + 0.62 * slots), 14), 3.3), layout="constrained")
        FigureCanvasAgg(figure)
        mean_axes, variance_axes = figure.subplots(1, 2)
        _bars(mean_axes, groups, styles, lambda arm: arm.mean, lambda arm: arm.ci95)
        mean_axes.set_title("Mean reward")
        _bars(variance_axes, groups, styles, lambda arm: arm.total_variance, None)
        variance_axes.set_title("Reward variance")
        handles = _legend(labels, styles)
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), handlelength=1.4)
        save_figure(figure, path, format)


def plot_bars(
    groups: Sequence[ArmGroup], quantity: str, path: Path | IO[bytes], *, legend: bool = True, format: str | None = None
) -> None:
    """Plot one of the two panels of `plot_comparison` by itself, narrow enough for a telephone.

    Args:
        groups: As in `plot_comparison`.
        quantity: ``mean`` or ``variance``.
        path: Where to write; the suffix determines the format.
        legend: Whether to name the arms.
        format: The format, if ``path`` is a stream.

    Raises:
        ValueError: There is no group, or a group has no arms.
    """
    if not groups or any(not group.arms for group in groups):
        raise ValueError("plot_bars needs at least one group, and at least one arm in each")
    labels = {arm.name: arm.label for group in groups for arm in group.arms}
    styles = _arm_styles(list(labels))
    slots = sum(len(group.arms) + 1 for group in groups)
    with style.context(STYLE):
        width = min(max(4.6, 0.9 + 0.42 * slots), 11)
        figure = Figure(figsize=(width, 3.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        if quantity == "mean":
            _bars(axes, groups, styles, lambda arm: arm.mean, lambda arm: arm.ci95)
        else:
            _bars(axes, groups, styles, lambda arm: arm.total_variance, None)
        if legend:
            figure.legend(
                handles=_legend(labels, styles),
                loc="outside lower center",
                ncols=_legend_columns(list(labels.values()), width),
                fontsize=8,
                handlelength=1.4,
            )
        save_figure(figure, path, format)


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """How many columns of a legend in 8 points fit in a figure of some inches: a letter takes about 0.065, a swatch 0.5."""
    each = 0.5 + 0.065 * max(map(len, labels))
    return max(1, min(3, len(labels), int(width / each)))


def plot_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path | IO[bytes],
    *,
    keys: Mapping[str, str] | None = None,
    format: str | None = None,
) -> bool:
    """Plot training curves, with one panel per metric and one line per run.

    Thin lines show the measured values, thick lines a moving mean over about a tenth of the run.

    Args:
        runs: Label of a run -> rows of its metrics.jsonl, each with ``step``; a row may lack a metric.
        path: Where to write; the suffix determines the format.
        keys: Metric -> title of its panel; by default those metrics of `CURVES` that occur in some row, and drift guards.
        format: The format, if ``path`` is a stream.

    Returns:
        Whether there was anything to draw; if not, nothing is written.
    """
    wanted = CURVES | _drift(runs) if keys is None else keys
    panels = [key for key in wanted if any(len(_series(rows, key)[0]) for rows in runs.values())]
    if not panels:
        return False
    columns = 4 if len(panels) in (4, 7, 8) else min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    with style.context(STYLE):
        figure = Figure(figsize=(max(3.1 * columns, 4.6), 2.2 * lines + 0.4), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes, key in zip(grid.flat, panels, strict=False):
            for color, (label, rows) in zip(_cycle(LINES, len(runs)), runs.items(), strict=True):
                steps, values = _series(rows, key)
                if len(steps) == 0:
                    continue
                smooth = _smooth(values, max(1, len(values) // 20))
                shown = _shown_places(len(steps))
                axes.plot(steps[shown], values[shown], color=color, alpha=0.3, linewidth=0.8)
                marker = "o" if len(steps) == 1 else None
                axes.plot(steps[shown], smooth[shown], color=color, label=label, marker=marker)
            axes.set_title(wanted[key], fontsize=9)
            axes.margins(x=0.01)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes in grid.flat[max(0, len(panels) - columns) : len(panels)]:
            axes.set_xlabel("step")
        if len(runs) > 1:
            handles = [
                Line2D([], [], color=color, label=label)
                for color, label in zip(_cycle(LINES, len(runs)), runs, strict=True)
            ]
            figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        save_figure(figure, path, format)
    return True


def plot_frontier(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path | IO[bytes], *, format: str | None = None
) -> bool:
    """Plot the reward against the KL to the reference during training, one line per run, from its first step to its last.

    Where the reward of training still rises with the KL and that of held-out prompts falls, the reward is over-optimised.

    Args:
        runs: Label of a run -> rows of its metrics.jsonl with ``kl`` and ``reward/mean``, and, at some steps, ``eval/kl`` and
            ``eval/reward``.
        path: Where to write; the suffix determines the format.
        format: The format, if ``path`` is a stream.

    Returns:
        Whether there was anything to draw; if not, nothing is written.
    """
    drawn = {
        label: (_pairs(rows, "kl", "reward/mean"), _pairs(rows, "eval/kl", "eval/reward"))
        for label, rows in runs.items()
    }
    drawn = {label: both for label, both in drawn.items() if len(both[0]) > 1 or len(both[1]) > 0}
    if not drawn:
        return False
    with style.context(STYLE):
        figure = Figure(figsize=(6.4, 3.3), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for color, (label, (train, heldout)) in zip(_cycle(LINES, len(drawn)), drawn.items(), strict=True):
            if len(train):
                window = max(1, len(train) // 12)
                kl, reward = (_smooth(values, window)[_shown_places(len(train))] for values in train.T)
                axes.plot(kl, reward, color=color, alpha=0.55, label=f"{label}, training samples")
                axes.plot(kl[-1:], reward[-1:], color=color, marker="s", markersize=5)
            if len(heldout):
                axes.plot(
                    *heldout.T,
                    color=color,
                    marker="o",
                    markersize=4,
                    linestyle="--",
                    label=f"{label}, held-out prompts",
                )
        axes.set_xlabel("KL to the reference (nats per sequence)")
        axes.set_ylabel("reward")
        axes.margins(x=0.03)
        figure.legend(loc="outside lower center", ncols=2)
        save_figure(figure, path, format)
    return True


def plot_distributions(arms: Sequence[ArmSummary], path: Path | IO[bytes], *, format: str | None = None) -> None:
    """Plot the empirical distribution of the prompts' mean rewards, one line per arm."""
    styles = _arm_styles([arm.name for arm in arms])
    with style.context(STYLE):
        figure = Figure(figsize=(6.4, 3.3), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for arm, dash in zip(arms, _cycle(("-", "--", "-.", ":"), len(arms)), strict=True):
            axes.ecdf(arm.rewards, color=styles[arm.name][0], linestyle=dash, label=arm.label)
        axes.set_xlabel("mean reward of a prompt")
        axes.set_ylabel("share of prompts")
        axes.set_ylim(0, 1.02)
        figure.legend(loc="outside lower center", ncols=min(3, len(arms)))
        save_figure(figure, path, format)


def arm_colors(names: Sequence[str]) -> dict[str, str]:
    """Key of an arm → the colour of its bars, if these are all arms of a figure, in its order."""
    return {name: color for name, (color, _) in _arm_styles(names).items()}


def to_svg(draw: Any, *arguments: Any, **options: Any) -> bytes:
    """The output of a plotting function as SVG; empty if it drew nothing."""
    stream = io.BytesIO()
    draw(*arguments, stream, format="svg", **options)
    return stream.getvalue()


def _bars(
    axes: Axes, groups: Sequence[ArmGroup], styles: Mapping[str, tuple[str, str]], height: Any, interval: Any
) -> None:
    largest = max(abs(height(arm)) for group in groups for arm in group.arms)
    decimals = 2 if largest >= 0.3 else min(6, 1 - math.floor(math.log10(largest))) if largest > 0 else 2
    left, centres, tops = 0.0, [], []
    for group in groups:
        positions = left + np.arange(len(group.arms))
        centres.append(float(positions.mean()))
        left = float(positions[-1]) + 1.9
        for x, arm in zip(positions, group.arms, strict=True):
            color, hatch = styles[arm.name]
            value = height(arm)
            axes.bar(x, value, width=0.86, color=color, hatch=hatch, edgecolor="white", linewidth=0)
            low, high = interval(arm) if interval else (math.nan, math.nan)
            if math.isfinite(low) and math.isfinite(high):
                axes.vlines(x, low, high, color="#222222", linewidth=1.1)
                axes.hlines([low, high], x - 0.11, x + 0.11, color="#222222", linewidth=1.1)
            bounds = [bound for bound in (0.0, value, low, high) if math.isfinite(bound)]
            below = value < 0
            edge = min(bounds) if below else max(bounds)
            tops.append(edge)
            axes.annotate(
                f"{value:.{decimals}f}",
                (x, edge),
                xytext=(0, -2.5 if below else 2.5),
                textcoords="offset points",
                ha="center",
                va="top" if below else "bottom",
                fontsize=7,
                color="#333333",
            )
    widths = [max(10, 6 * len(group.arms)) for group in groups]
    axes.set_xticks(centres, [textwrap.fill(g.label, w) for g, w in zip(groups, widths, strict=True)])
    axes.axhline(0, color="#555555", linewidth=0.8)
    low, high = min(0.0, *tops), max(0.0, *tops)
    margin = 0.10 * ((high - low) or 1.0)  # for the numbers at the ends of the bars
    axes.set_ylim(low - margin if low < 0 else 0, high + margin if high > 0 else margin)


def _legend(labels: Mapping[str, str], styles: Mapping[str, tuple[str, str]]) -> list[Patch]:
    return [
        Patch(facecolor=styles[name][0], hatch=styles[name][1], edgecolor="white", label=label)
        for name, label in labels.items()
    ]


def _arm_styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    others, gibbs = (iter(_cycle(styles, len(names))) for styles in (_OTHERS, _GIBBS))
    return {name: ARM_STYLE.get(name) or (next(gibbs) if name.startswith("gibbs_") else next(others)) for name in names}


def _drift(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """Metric -> title of the drift guards that the runs measured."""
    names = {key for rows in runs.values() for row in rows for key in row if key.startswith(_GUARD)}
    return {key: f"Drift: {key.removeprefix(_GUARD).replace('_', ' ')}" for key in sorted(names)}


def _cycle(items: Sequence[Any], count: int) -> list[Any]:
    return [items[i % len(items)] for i in range(count)]


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values (n,) of a metric, without values that are not finite numbers."""
    pairs = [
        (row["step"], row[key])
        for row in rows
        if "step" in row and isinstance(row.get(key), int | float) and math.isfinite(row[key])
    ]
    if not pairs:
        return np.empty(0), np.empty(0)
    steps, values = np.asarray(pairs, np.float64).T
    return steps, values


def _pairs(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> np.ndarray:
    """(n, 2) values of two metrics, of the rows in which both are finite numbers."""
    found = [
        (row[x], row[y])
        for row in rows
        if all(isinstance(row.get(key), int | float) and math.isfinite(row[key]) for key in (x, y))
    ]
    return np.asarray(found, np.float64).reshape(-1, 2)


def _shown_places(count: int) -> np.ndarray:
    """At most `_MOST_POINTS` places of a curve, evenly spread, with both ends: a file holds many curves."""
    return np.unique(np.linspace(0, count - 1, min(count, _MOST_POINTS)).round().astype(np.int64))


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean (n,) over 2·window + 1 points, fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, stop = np.maximum(index - window, 0), np.minimum(index + window + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)
