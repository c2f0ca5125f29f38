"""Print the results to the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from benchmarks.table import print_not_measured, print_table

COLUMNS = (
    "entrant",
    "quantity",
    "forward",
    "fwd + bwd",
    "× floor",
    "× naive",
    "extra MiB",
    "grads MiB",
    "off by",
)
WIDTHS = (16, 54, *[9] * 7)


def print_shape(console: Console, results: list[dict[str, Any]]) -> None:
    """Print the tables of one shape, one per case with the floor first, then the entrants that did not run, and why."""
    shape = results[0]["shape"]
    softcap = f", soft-cap {shape['softcap']:g}" if shape["softcap"] else ""
    console.print(
        f"\n[bold]{shape['name']}[/bold]: D {shape['hidden']}, V {shape['vocabulary']}{softcap}, {results[0]['dtype']}",
        highlight=False,
    )
    for result in results:
        floor, products = result["floor"], len(result["case"]["products"])
        work = f"{products} bare product{'s' if products > 1 else ''}, {floor['teraflops']:.3g} TFLOP/s"
        rows = [["floor", work, "", _seconds(floor["seconds"]), "1.00", "", "", "", ""]]
        rows += [_row(entrant) for entrant in result["entrants"] if entrant["total_seconds"] is not None]
        title = f"{result['case']['title']}, N {result['rows']}"
        print_table(console, COLUMNS, rows, left=2, title=title, widths=WIDTHS)
    print_not_measured(console, {result["case"]["name"]: result["entrants"] for result in results})


def _row(entrant: dict[str, Any]) -> list[str]:
    off = max((abs(v) for k, v in entrant["deviation"].items() if k != "sigmas"), default=None)
    return [
        entrant["entrant"] + (" WRONG" if entrant["status"] == "wrong" else ""),
        entrant["quantity"],
        _seconds(entrant["forward_seconds"]),
        _seconds(entrant["total_seconds"]),
        f"{entrant['ratio_to_floor']:.2f}",
        _number(entrant["ratio_to_naive"], ".2f"),
        _number(entrant["peak_extra_mib"], ".0f"),
        _number(entrant["gradients_mib"], ".0f"),
        _number(off, ".0e"),
    ]


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-4 else f"{value * 1e6:.0f} µs"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
