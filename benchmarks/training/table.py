"""Print the results to the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.training.step import PHASES, TOKEN_KINDS


def print_table(console: Console, document: Mapping[str, Any], names: list[str]) -> None:
    """Print one row per entrant (chains/s, seconds per phase, tokens), then the entrants that did not run, and why."""
    table = Table(box=SIMPLE)
    table.add_column("entrant")
    for heading in ("chains/s", "step", *PHASES, "tokens computed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in names:
        entrant = document[name]
        if entrant["status"] == "measured":
            phases = [f"{entrant['phases'][phase]:.3g} s" for phase in PHASES]
            tokens = sum(entrant["tokens"].get(kind, 0) for kind in TOKEN_KINDS)
            table.add_row(name, f"{entrant['chains_per_s']:.2f}", f"{entrant['step_s']:.3g} s", *phases, f"{tokens:,}")
    console.print(table)
    if document["ratio"] is not None:
        console.print(f"ours over trl: {document['ratio']:.2f} × the chains/s", highlight=False)
    for name in names:
        if document[name]["status"] != "measured":
            console.print(
                f"{name} {document[name]['status']}: {document[name]['reason']}", highlight=False, markup=False
            )
