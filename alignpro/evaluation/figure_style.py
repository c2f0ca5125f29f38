"""The style that all charts have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "ytick.major.size": 0,
    "xtick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "savefig.dpi": 200,
    "text.parse_math": False,  # a $ in a label is literal
    "svg.hashsalt": "alignpro",  # with the date omitted, equal data give equal bytes
}


@contextmanager
def new_figure(size: tuple[float, float]) -> Iterator[Figure]:
    """A figure of some inches, drawn in this style while the context is open."""
    with style.context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def save_figure(figure: Figure, path: Path | IO[bytes], format: str | None) -> None:
    """Write a figure; equal data give equal bytes.

    Args:
        figure: The figure.
        path: Where to write; the suffix determines the format.
        format: The format, if ``path`` is a stream.
    """
    kind = format or Path(str(path)).suffix.removeprefix(".")
    if kind == "svg":
        # A drawing begins with the layout; `savefig` draws everything once before, for the layout alone.
        FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})
    else:
        figure.savefig(path, format=kind)
