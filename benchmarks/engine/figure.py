"""Plot of the results: the throughput of every entrant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.figure import describe_run, new_figure

COLOURS = {
    "ours": "#0072B2",
    "hf-generate": "#E69F00",
    "hf-continuous": "#009E73",
    "vllm": "#CC79A7",
    "vllm-eager": "#56B4E9",
    "llama.cpp": "#D55E00",
}


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the PNG with one panel per case; entrants that did not run are left out."""
    results, run = document["results"], document["run"]
    title = f"Generation to full lengths. {describe_run(run)}, transformers {run['versions']['transformers']}"
    with new_figure(path, (2.0 + 2.2 * len(results), 3.4), title) as figure:
        panels = figure.subplots(1, len(results), squeeze=False)[0]
        for axes, result in zip(panels, results, strict=True):
            speeds = {e["entrant"]: e["sequences_per_s"] for e in result["entrants"] if e["status"] == "measured"}
            colours = [COLOURS.get(name, "#8A8A8A") for name in speeds]
            bars = axes.bar(list(speeds), list(speeds.values()), 0.7, color=colours)
            axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
            axes.set_title(result["case"])
            axes.set_ylabel("chains/s" if result["chain"] else "sequences/s")
            axes.tick_params(axis="x", labelrotation=20, labelsize=7)
