"""Print the results to the terminal."""

from __future__ import annotations

from typing import Any

from benchmarks.session import Session
from benchmarks.table import print_not_measured, print_table
from benchmarks.training.step import PHASES, TOKEN_KINDS, step_cells


def print_results(session: Session, entrants: dict[str, dict[str, Any]], ratio: float | None) -> None:
    """Print one row per entrant (chains/s, seconds per phase, tokens), then the entrants that did not run, and why."""
    rows = []
    for name, entrant in entrants.items():
        if entrant["status"] == "measured":
            tokens = sum(entrant["tokens"].get(kind, 0) for kind in TOKEN_KINDS)
            rows.append([name, f"{entrant['chains_per_s']:.2f}", *step_cells(entrant), f"{tokens:,}"])
    print_table(session.console, ("entrant", "chains/s", "step", *PHASES, "tokens computed"), rows)
    if ratio is not None:
        session.print(f"ours over trl: {ratio:.2f} × the chains/s")
    print_not_measured(session.console, {"": [{"entrant": name} | entrant for name, entrant in entrants.items()]})
