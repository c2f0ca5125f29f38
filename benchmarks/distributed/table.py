"""Print the results to the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.session import Session
from benchmarks.table import print_table
from benchmarks.training.step import PHASES, step_cells

MIB = 1 << 20


def print_results(session: Session, document: Mapping[str, Any]) -> None:
    """Print one row per set-up (seconds, tokens/s), one row per peak (MiB measured and planned), then the ratios."""
    times = [
        [name, str(found["ranks"]), *step_cells(found), f"{found['tokens_per_s']:,.0f}"]
        for name, found in document["setups"].items()
    ]
    if times:
        print_table(session.console, ("set-up", "ranks", "step", *PHASES, "tokens/s"), times)
    peaks = [
        [
            name,
            peak,
            f"{measured / MIB:,.1f}",
            f"{found['planned'][peak] / MIB:,.1f}",
            f"{found['planned_over_measured'][peak]:.3f}",
        ]
        for name, found in document["memory"].items()
        for peak, measured in found["measured"].items()
    ]
    if peaks:
        columns = ("set-up", "peak", "MiB measured", "MiB planned", "planned / measured")
        print_table(session.console, columns, peaks, left=2)
    for name, ratio in document["ratios"].items():
        session.print(f"{name}: {ratio:.3f}")
