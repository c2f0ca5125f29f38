"""Runs all probes and prints their findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignpro.doctor import devices, generation, kernels, machine, packages, prompting
from alignpro.doctor.findings import Finding

_MARKS = {"ok": "[green]✓[/green]", "off": "[dim]–[/dim]", "problem": "[red]✗[/red]"}

_PROBES: list[tuple[str, str, Callable[[], Iterator[Finding]]]] = [
    ("Machine", "machine", machine.system),
    ("Packages", "packages", packages.requirements),
    ("Devices", "torch", devices.torch_build),
    ("Devices", "devices", devices.gpus),
    ("Devices", "triton", devices.triton),
    ("Kernels", "kernels", kernels.backends),
    ("Kernels", "bfloat16", kernels.bfloat16_weights),
    ("Attention", "attention", kernels.attention_libraries),
    ("Generation", "generation", generation.chains),
    ("Compilers", "compilers", machine.compilers),
    ("Extras", "extras", packages.extras),
    ("Meta-prompts", "meta_prompts", prompting.meta_prompts),
]
"""Section, name and function of each probe."""


def diagnose() -> list[Finding]:
    """Check the machine, the packages and the project's own backends.

    Returns:
        The findings, grouped by section.
    """
    return [finding for section, name, probe in _PROBES for finding in _findings(section, name, probe)]


def print_diagnosis(console: Console | None = None) -> bool:
    """Print what `diagnose` finds, by section.

    Returns:
        Whether everything that training needs is available.
    """
    console = console or Console()
    findings = diagnose()
    for section in dict.fromkeys(finding.section for finding in findings):
        table = Table(
            box=None, show_header=False, pad_edge=False, title=section, title_justify="left", title_style="bold"
        )
        table.add_column(width=1)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in (each for each in findings if each.section == section):
            remedy = f"\n[cyan]→ {escape(finding.remedy)}[/cyan]" if finding.remedy else ""
            table.add_row(_MARKS[finding.status], escape(finding.name), escape(finding.detail) + remedy)
        console.print(table)
        console.print()
    problems = [finding for finding in findings if finding.status == "problem"]
    if problems:
        console.print(f"[red]To fix: {escape(', '.join(each.name for each in problems))}[/red]")
    else:
        console.print("[green]Everything that training needs is available.[/green]")
    return not problems


def _findings(section: str, name: str, probe: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the probe's findings, followed by one more if an import fails in it."""
    try:
        yield from probe()
    except (ImportError, OSError) as error:  # OSError: a shared library that an extension needs is missing
        yield Finding(section, name, "problem", f"cannot be checked: {error}", "make setup")
