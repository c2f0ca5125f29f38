"""Print the results to the terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 160  # if the output is not a terminal
COLUMNS = ("forward", "fwd + bwd", "× floor", "× naive", "extra MiB", "grads MiB", "off by")


def print_table(console: Console, results: list[dict[str, Any]], dtype: str) -> None:
    """Print the tables of one shape, one per case with the floor first, then the entrants that did not run, and why."""
    shape = results[0]["shape"]
    softcap = f", soft-cap {shape['softcap']:g}" if shape["softcap"] else ""
    console.print(
        f"\n[bold]{shape['name']}[/bold]: D {shape['hidden']}, V {shape['vocabulary']}{softcap}, {dtype}",
        highlight=False,
    )
    for result in results:
        console.print(_table(result))
    console.print(_notes(results))


def _table(result: dict[str, Any]) -> Table:
    floor, products = result["floor"], len(result["case"]["products"])
    table = Table(
        title=f"{result['case']['title']}, N {result['rows']}", title_justify="left", title_style="bold", box=SIMPLE
    )
    table.add_column("entrant", width=16, no_wrap=True)
    table.add_column("quantity", width=54, no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", width=9, no_wrap=True)
    work = f"{products} bare product{'s' if products > 1 else ''}, {floor['teraflops']:.3g} TFLOP/s"
    table.add_row("floor", work, "", _seconds(floor["seconds"]), "1.00", "", "", "", "")
    for entrant in result["entrants"]:
        if entrant["total_seconds"] is not None:
            table.add_row(*_row(entrant))
    return table


def _row(entrant: dict[str, Any]) -> tuple[str, ...]:
    off = max((abs(v) for k, v in entrant["deviation"].items() if k != "sigmas"), default=None)
    return (
        entrant["entrant"] + (" WRONG" if entrant["status"] == "wrong" else ""),
        entrant["quantity"],
        _seconds(entrant["forward_seconds"]),
        _seconds(entrant["total_seconds"]),
        f"{entrant['ratio_to_floor']:.2f}",
        _number(entrant["ratio_to_naive"], ".2f"),
        _number(entrant["peak_extra_mib"], ".0f"),
        _number(entrant["gradients_mib"], ".0f"),
        _number(off, ".0e"),
    )


def _notes(results: list[dict[str, Any]]) -> Text:
    """List the entrants that were skipped, failed or wrong: each reason once, with the cases to which it applies."""
    cases: dict[tuple[str, str, str], dict[str, None]] = {}  # an ordered set of names
    for result in results:
        for entrant in result["entrants"]:
            if entrant["status"] != "measured":
                key = (entrant["entrant"], entrant["status"], entrant["reason"])
                cases.setdefault(key, {})[result["case"]["name"]] = None
    every = list(dict.fromkeys(result["case"]["name"] for result in results))
    lines = [
        f"{entrant} {status}{_where(list(names), every)}: {reason}"
        for (entrant, status, reason), names in sorted(cases.items())
    ]
    return Text("\n".join(lines) + "\n" if lines else "")


def _where(names: list[str], every: list[str]) -> str:
    """Describe the cases: nothing if all, "all but" the others if most, otherwise their names."""
    others = [name for name in every if name not in names]
    if not others:
        return ""
    return f" (all but {', '.join(others)})" if len(others) < len(names) else f" ({', '.join(names)})"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-4 else f"{value * 1e6:.0f} µs"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
