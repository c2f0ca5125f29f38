"""Print the results to the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from benchmarks.table import print_not_measured, print_table

COLUMNS = ("new tokens/s", "seconds", "× floor", "ours is faster", "computed / floor", "host share")


def print_case(console: Console, result: dict[str, Any]) -> None:
    """Print the table of one case, then the entrants that did not run, with the reasons."""
    columns = ("entrant", "chains/s" if result["chain"] else "sequences/s", *COLUMNS)
    floor = ("floor", "", "", f"{sum(result['floor'].values()):.3g}", "1.00", "", "", "")
    measured = [_row(entrant) for entrant in result["entrants"] if entrant["status"] == "measured"]
    print_table(console, columns, [floor, *measured], title=result["title"], widths=(14,))
    if decode := result.get("decode_ticks"):
        line = f"decode tick: {decode['tick_s'] * 1e3:.3g} ms, host share {decode['host_share']:.1%}"
        console.print(line, highlight=False)
    print_not_measured(console, {result["case"]: result["entrants"]})


def _row(entrant: dict[str, Any]) -> tuple[str, ...]:
    details = entrant["details"]
    return (
        entrant["entrant"],
        f"{entrant['sequences_per_s']:.2f}",
        f"{entrant['tokens_per_s']:.0f}",
        f"{entrant['seconds']:.3g}",
        f"{entrant['ratio_to_floor']:.2f}",
        "" if entrant["ours_over_it"] is None else f"{entrant['ours_over_it']:.2f} ×",
        f"{details['computed_over_floor']:.3f}" if details else "",
        f"{details['host_share']:.1%}" if details else "",
    )
