"""Plot of the results: time over the floor and memory, with one row of panels per case."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.figure import new_figure

# Ours in one hue, dark to light; the others in the remaining colours of Okabe and Ito's palette (2008), some with hatches.
COLOURS: dict[str, tuple[str, str]] = {
    "ours-cpp": ("#0072B2", ""),
    "ours-triton": ("#0072B2", ""),
    "ours-torch": ("#56B4E9", ""),
    "ours-reference": ("#BFE3F7", ""),
    "naive": ("#8A8A8A", ""),
    "naive-token": ("#8A8A8A", "...."),
    "compile": ("#C4C4C4", ""),
    "torch-lce": ("#E69F00", ""),
    "liger-grpo": ("#009E73", ""),
    "liger-ce": ("#009E73", "////"),
    "liger-ce-fp32": ("#009E73", "xxxx"),
    "trl": ("#CC79A7", ""),
    "cce": ("#D55E00", ""),
    "cce-compile": ("#D55E00", "////"),
}
OTHER = ("#F0E442", "")
RATIO_TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100, 200, 500, 1000)


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the PNG, for the dtype of the last run and the largest N of each shape."""
    run = document["runs"][-1]
    results = [result for result in document["results"] if result["dtype"] == run["dtype"]]
    panels = _panels(results)
    titles = _entrants(results)
    width = max(10.0, 3.0 + 2.6 * max(len(panel) for panel in panels.values()))
    columns = max(1, int(width / 2.4))
    legend = 0.2 * math.ceil(len(titles) / columns) + 0.15  # inches
    title = (
        f"{run['device']['name']}, {run['dtype']}, torch {run['versions']['torch']}: time over that of the bare matrix "
        "products (floor),\nand peak memory beyond inputs and gradients"
    )
    with new_figure(path, (width, 1.4 + 2.2 * len(panels)), title, bottom=legend) as figure:
        grid = figure.subplots(len(panels), 2, squeeze=False)
        for (ratios, memory), (case, panel) in zip(grid, panels.items(), strict=True):
            _bars(ratios, panel, list(titles), "ratio_to_floor")
            _bars(memory, panel, list(titles), "peak_extra_mib")
            ratios.set_title(case)
            ratios.set_ylabel("time / floor")
            memory.set_ylabel("extra memory, MiB")
        handles = []
        for name, label in titles.items():
            colour, hatch = COLOURS.get(name, OTHER)
            handles.append(Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=label))
        figure.legend(handles=handles, loc="lower left", ncols=columns)


def _panels(results: list[dict[str, Any]]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Return title → (label, result) per group of bars; all batch sizes of sampling share one panel."""
    largest: dict[tuple[str, str], int] = {}
    for result in results:
        key = (result["case"]["name"], result["shape"]["name"])
        largest[key] = max(result["rows"], largest.get(key, 0))
    panels: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for result in results:
        case, shape = result["case"], result["shape"]["name"]
        if result["rows"] != largest[case["name"], shape]:
            continue
        sampled = case["operator"] == "linear_sample"
        label = f"{shape}\n{'batch' if sampled else 'N'} {result['rows']}"
        panels.setdefault("sample" if sampled else case["title"], []).append((label, result))
    return panels


def _entrants(results: list[dict[str, Any]]) -> dict[str, str]:
    """Return name → title of the entrants with results, in the order of `COLOURS`."""
    entrants = [e for result in results for e in result["entrants"] if e["total_seconds"] is not None]
    titles = {e["entrant"]: e["title"] for e in entrants}
    return {name: titles[name] for name in dict.fromkeys([*COLOURS, *titles]) if name in titles}


def _bars(axes: Axes, results: list[tuple[str, dict[str, Any]]], names: list[str], quantity: str) -> None:
    ratio = quantity == "ratio_to_floor"
    heights: list[float] = []
    crowded = sum(e[quantity] is not None for _, result in results for e in result["entrants"]) > 14
    for group, (_, result) in enumerate(results):
        entrants = {e["entrant"]: e for e in result["entrants"] if e[quantity] is not None}
        present = [name for name in names if name in entrants]
        width = 0.86 / max(len(present), 1)
        for place, name in enumerate(present):
            value = entrants[name][quantity]
            heights.append(value if ratio else max(value, 1.0))  # less than 1 MiB is within the measurement error
            x = group + (place - (len(present) - 1) / 2) * width
            colour, hatch = COLOURS.get(name, OTHER)
            bar = axes.bar(x, heights[-1], 0.94 * width, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
            text = _label(value, ratio) + (" wrong" if entrants[name]["status"] == "wrong" else "")
            axes.bar_label(bar, [text], padding=1.5, fontsize=6, rotation=90 if crowded else 0)
    axes.set_yscale("log")
    axes.set_xticks(range(len(results)), [label for label, _ in results])
    axes.set_xlim(-0.5, len(results) - 0.5)
    if not heights:
        return
    top = max(heights)
    if ratio:
        axes.set_ylim(min(0.7, 0.9 * min(heights)), 1.7 * max(top, 2))
        axes.axhline(1, color="#333333", linewidth=1)
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(FixedLocator([t for t in RATIO_TICKS if low <= t <= high]))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0.8, 6 * max(top, 10))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _label(value: float, ratio: bool) -> str:
    if ratio:
        return f"{value:.2f}" if value < 10 else f"{value:.0f}"
    if value < 1:
        return "<1"
    return f"{value:.0f}" if value < 10240 else f"{value / 1024:.0f}k"
