"""Figures of results: their style, title and file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "savefig.dpi": 160,
    "text.parse_math": False,
}
MARGIN = 0.08
"""Of the title, in inches."""


@contextmanager
def new_figure(path: Path, size: tuple[float, float], title: str, *, bottom: float = 0.0) -> Iterator[Figure]:
    """Yield an empty figure to draw on, then write it as a PNG.

    Args:
        path: The file to write.
        size: Width and height in inches.
        title: Text at the top left.
        bottom: Inches below the panels, for a legend.
    """
    width, height = size
    with style.context(["default", STYLE]):
        figure = Figure(figsize=size)
        yield figure
        figure.suptitle(title, x=MARGIN / width, y=1 - MARGIN / height, ha="left", va="top", fontsize=9)
        figure.tight_layout(rect=(0, bottom / height, 1, 1 - MARGIN / height))
        figure.savefig(path)


def describe_run(run: Mapping[str, Any]) -> str:
    """Return device, threads, dtype and version of torch of a run, for a title."""
    return f"{run['device']['name']}, {run['threads']} threads, {run['dtype']}, torch {run['versions']['torch']}"
