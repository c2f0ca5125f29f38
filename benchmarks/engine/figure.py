"""Plot of the results: the throughput of every entrant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.style import STYLE

COLOURS = {"ours": "#0072B2", "hf-generate": "#E69F00", "hf-continuous": "#009E73"}


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the PNG with one panel per case; entrants that did not run are left out."""
    results, run = document["results"], document["run"]
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(2.0 + 2.2 * len(results), 3.4))
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(results), squeeze=False)[0]
        for axes, result in zip(panels, results, strict=True):
            entrants = {e["entrant"]: e for e in result["entrants"] if e["status"] == "measured"}
            speeds = [entrant["sequences_per_s"] for entrant in entrants.values()]
            bars = axes.bar(list(entrants), speeds, 0.7, color=[COLOURS.get(name, "#8A8A8A") for name in entrants])
            axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
            axes.set_title(result["case"])
            axes.set_ylabel("chains/s" if result["chain"] else "sequences/s")
            axes.tick_params(axis="x", labelrotation=20, labelsize=7)
        figure.suptitle(
            f"Generation to full lengths. {run['device']['name']}, {run['threads']} threads, {run['dtype']}, "
            f"torch {run['versions']['torch']}, transformers {run['versions']['transformers']}",
            x=0.01,
            ha="left",
            fontsize=9,
        )
        figure.tight_layout()
        figure.savefig(path)
