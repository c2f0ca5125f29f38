"""Print the results to the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from benchmarks.table import print_not_measured, print_table

COLUMNS = ("new tokens/s", "seconds", "× floor", "ours is faster", "computed / floor", "host share")


def print_case(console: Console, result: dict[str, Any]) -> None:
    """Print the table of one case, then the entrants that did not run, with the reasons."""
    columns = ("entrant", "chains/s" if result["chain"] else "sequences/s", *COLUMNS)
    own = sum(result["floor"].values())
    floors = {name: sum(parts.values()) for name, parts in result.get("floor_by_dtype", {}).items()}
    floor = [
        ("floor" if len(floors) < 2 else f"floor, {name}", "", "", f"{seconds:.3g}", f"{seconds / own:.2f}", "", "", "")
        for name, seconds in (floors or {"": own}).items()
    ]
    measured = [_row(entrant) for entrant in result["entrants"] if entrant["status"] == "measured"]
    print_table(console, columns, [*floor, *measured], title=result["title"], widths=(16,))
    if decode := result.get("decode_ticks"):
        line = f"decode tick: {decode['tick_s'] * 1e3:.3g} ms, host share {decode['host_share']:.1%}"
        console.print(line, highlight=False)
    for entrant in result["entrants"]:
        if busy := entrant["busy"]:
            line = (
                f"{entrant['entrant']} beside {busy['processes']} busy processes: {busy['tokens_per_s']:.0f} new tokens/s, "
                f"{busy['over_fair_share']:.2f} of the fair share ({busy['fair_share']:.2f} of {entrant['tokens_per_s']:.0f})"
            )
            console.print(line, highlight=False)
    print_not_measured(console, {result["case"]: result["entrants"]})


def print_simulation(console: Console, runs: Sequence[dict[str, Any]]) -> None:
    """Print a line per model and run of a simulation, then the times of each run."""
    columns = (
        "run",
        "model",
        "replayed",
        "first",
        "eager",
        "captures",
        "launches",
        "TB",
        "PFLOP",
        "floor s",
        "predicted s",
    )
    rows = []
    for turn, result in enumerate(runs):
        for name, model in result["models"].items():
            passes = model["passes"]
            rows.append(
                (
                    str(turn),
                    name,
                    f"{passes.get('replayed', 0)} ({model['replayed_share']:.1%})",
                    str(passes.get("padded", 0)),
                    str(passes.get("eager", 0)),
                    str(model["captures"]),
                    str(model["launches"]),
                    f"{model['bytes'] / 1e12:.2f}",
                    f"{model['flops'] / 1e15:.2f}",
                    f"{model['floor_s']:.2f}",
                    f"{model['predicted_s']:.2f}",
                )
            )
    print_table(console, columns, rows, left=2)
    for turn, result in enumerate(runs):
        times = (
            f"predicted {result['predicted_s']:.2f} s, floor {result['floor_s']:.2f} s, host {result['host_s']:.2f} s"
        )
        if result["ahead_ticks"]:
            times += f", of which {result['host_hidden_s']:.2f} s beside {result['ahead_ticks']} passes launched ahead"
        if full := result["host_full_median_s"]:
            times += f" ({full * 1e3:.2f} ms a decode tick of a full batch, median of {result['host_full_ticks']})"
        mixed = (
            f"{result['mixed_ticks']} of them with prefill beside, {result['copies_to_device']} copies to the device"
        )
        console.print(f"run {turn}: {result['ticks']} ticks, {mixed}; {times}", highlight=False)


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
