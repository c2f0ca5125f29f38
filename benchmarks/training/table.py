"""Print the results to the terminal."""

from __future__ import annotations

from typing import Any

from benchmarks.session import Session
from benchmarks.table import print_not_measured, print_table
from benchmarks.training.step import PHASES, TOKEN_KINDS, step_cells


def print_results(
    session: Session, entrants: dict[str, dict[str, Any]], ratio: float | None, floors: dict[str, dict[str, float]]
) -> None:
    """Print one row per entrant (chains/s, seconds per phase, tokens), then the entrants that did not run, and why.

    Args:
        session: The run.
        entrants: Name → results.
        ratio: Our chains per second over TRL's.
        floors: Dtype → the least seconds of a step of full lengths, ``rollout`` and ``learn``.
    """
    rows = []
    for dtype, parts in floors.items():
        least = [f"{seconds:.3g} s" for seconds in (sum(parts.values()), parts["rollout"])]
        rows.append([f"floor, {dtype}", "", *least, "", "", f"{parts['learn']:.3g} s", ""])
    for name, entrant in entrants.items():
        if entrant["status"] == "measured":
            tokens = sum(entrant["tokens"].get(kind, 0) for kind in TOKEN_KINDS)
            rows.append([name, f"{entrant['chains_per_s']:.2f}", *step_cells(entrant), f"{tokens:,}"])
    print_table(session.console, ("entrant", "chains/s", "step", *PHASES, "tokens computed"), rows)
    if ratio is not None:
        session.print(f"ours over trl: {ratio:.2f} × the chains/s")
    print_not_measured(session.console, {"": [{"entrant": name} | entrant for name, entrant in entrants.items()]})
