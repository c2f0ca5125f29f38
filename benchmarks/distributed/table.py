"""Print the results to the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.training.step import PHASES

MIB = 1 << 20


def print_table(console: Console, document: Mapping[str, Any]) -> None:
    """Print one row per set-up (seconds, tokens/s), one row per peak (MiB measured and planned), then the ratios."""
    if document["setups"]:
        table = Table(box=SIMPLE)
        for heading in ("set-up", "ranks", "step", *PHASES, "tokens/s"):
            table.add_column(heading, justify="left" if heading == "set-up" else "right", no_wrap=True)
        for name, found in document["setups"].items():
            phases = [f"{found['phases'][phase]:.3g} s" for phase in PHASES]
            table.add_row(
                name, str(found["ranks"]), f"{found['step_s']:.3g} s", *phases, f"{found['tokens_per_s']:,.0f}"
            )
        console.print(table)
    if document["memory"]:
        table = Table(box=SIMPLE)
        for heading in ("set-up", "peak", "MiB measured", "MiB planned", "planned / measured"):
            table.add_column(heading, justify="left" if heading in ("set-up", "peak") else "right", no_wrap=True)
        for name, found in document["memory"].items():
            for peak, measured in found["measured"].items():
                planned, share = found["planned"][peak], found["planned_over_measured"][peak]
                table.add_row(name, peak, f"{measured / MIB:,.1f}", f"{planned / MIB:,.1f}", f"{share:.3f}")
        console.print(table)
    for name, ratio in document["ratios"].items():
        console.print(f"{name}: {ratio:.3f}", highlight=False)
