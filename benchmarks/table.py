"""Tables of results on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


def print_table(
    console: Console,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: int = 1,
    title: str | None = None,
    widths: Sequence[int] = (),
) -> None:
    """Print a table.

    Args:
        console: The terminal.
        columns: The headings.
        rows: The cells of each row.
        left: Number of columns that hold text, aligned to the left; the others hold numbers.
        title: A line above the table.
        widths: Widths of the first columns, in characters, for tables that are to align; the others have the width
            of their content.
    """
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
    for index, (column, width) in enumerate(zip_longest(columns, widths)):
        table.add_column(column, justify="left" if index < left else "right", width=width, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_not_measured(console: Console, cases: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print which entrants were skipped, failed or wrong: each reason once, with the cases to which it applies.

    Args:
        console: The terminal.
        cases: Case → the results of its entrants, with ``entrant``, ``status`` and ``reason``.
    """
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for case, entrants in cases.items():
        for result in entrants:
            if result["status"] != "measured":
                reasons.setdefault((result["entrant"], result["status"], result["reason"]), []).append(case)
    for (entrant, status, reason), names in sorted(reasons.items()):
        line = f"{entrant} {status}{_where(names, list(cases))}: {reason}"
        console.print(line, highlight=False, markup=False)


def _where(names: list[str], every: list[str]) -> str:
    """Describe the cases: nothing if all, "all but" the others if most, otherwise their names."""
    others = [name for name in every if name not in names]
    if not others:
        return ""
    return f" (all but {', '.join(others)})" if len(others) < len(names) else f" ({', '.join(names)})"
