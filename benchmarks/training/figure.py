"""Plot of the results: chains/s, and seconds and computed tokens per step by phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.figure import describe_run, new_figure
from benchmarks.training.step import PHASES, TOKEN_KINDS

COLOURS = {
    "rollout": "#0072B2",
    "prefill": "#56B4E9",
    "decode": "#0072B2",
    "recompute": "#CC79A7",
    "reward": "#F0E442",
    "credit": "#009E73",
    "update": "#D55E00",
}


def draw(document: Mapping[str, Any], names: Sequence[str], path: Path) -> None:
    """Write the PNG; entrants that did not run are left out."""
    entrants = {name: document[name] for name in names if document[name]["status"] == "measured"}
    workload = document["workload"]["name"]
    title = f"{workload}: a whole step of reinforcement learning. {describe_run(document['run'])}"
    with new_figure(path, (10.0, 3.4), title) as figure:
        speed, seconds, tokens = figure.subplots(1, 3)
        bars = speed.bar(list(entrants), [e["chains_per_s"] for e in entrants.values()], 0.6, color="#0072B2")
        speed.bar_label(bars, fmt="%.1f", padding=2)
        speed.set_title("chains/s")
        _stack(seconds, {name: e["phases"] for name, e in entrants.items()}, PHASES)
        seconds.set_title("seconds per step")
        _stack(tokens, {name: e["tokens"] for name, e in entrants.items()}, TOKEN_KINDS)
        tokens.set_title("tokens computed per step")


def _stack(axes: Axes, parts: Mapping[str, Mapping[str, float]], order: Sequence[str]) -> None:
    """Draw one stacked bar per entrant, with the parts in order; parts that no entrant has are left out."""
    bottoms = dict.fromkeys(parts, 0.0)
    for part in order:
        heights = [values.get(part, 0) for values in parts.values()]
        if any(heights):
            axes.bar(list(parts), heights, 0.6, list(bottoms.values()), color=COLOURS[part], label=part)
            bottoms = {name: bottoms[name] + height for name, height in zip(parts, heights, strict=True)}
    axes.legend(fontsize=7)
