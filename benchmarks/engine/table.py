"""Print the results to the terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


def print_table(console: Console, result: dict[str, Any]) -> None:
    """Print the table of one case, then the entrants that did not run, with the reasons."""
    what = "chains/s" if result["chain"] else "sequences/s"
    table = Table(title=result["title"], title_justify="left", title_style="bold", box=SIMPLE)
    table.add_column("entrant", width=14)
    for heading in (what, "new tokens/s", "seconds", "× floor", "ours is faster", "computed / floor", "host share"):
        table.add_column(heading, justify="right", no_wrap=True)
    floor = sum(result["floor"].values())
    table.add_row("floor", "", "", f"{floor:.3g}", "1.00", "", "", "")
    for entrant in result["entrants"]:
        if entrant["status"] == "measured":
            details = entrant["details"]
            table.add_row(
                entrant["entrant"],
                f"{entrant['sequences_per_s']:.2f}",
                f"{entrant['tokens_per_s']:.0f}",
                f"{entrant['seconds']:.3g}",
                f"{entrant['ratio_to_floor']:.2f}",
                "" if entrant["ours_over_it"] is None else f"{entrant['ours_over_it']:.2f} ×",
                f"{details['computed_over_floor']:.3f}" if details else "",
                f"{details['host_share']:.1%}" if details else "",
            )
    console.print(table)
    if decode := result.get("decode_ticks"):
        line = f"decode tick: {decode['tick_s'] * 1e3:.3g} ms, host share {decode['host_share']:.1%}"
        console.print(line, highlight=False)
    for entrant in result["entrants"]:
        if entrant["status"] != "measured":
            line = f"{entrant['entrant']} {entrant['status']}: {entrant['reason']}"
            console.print(line, highlight=False, markup=False)
