"""`alignpro ledger`: what was asked of servers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="What was asked of servers, what they answered, and what it cost.", no_args_is_help=True, rich_markup_mode=None
)

LedgerPath = Annotated[
    Path, typer.Argument(metavar="FILE|RUN", help="A ledger, or a run directory with a ledger.sqlite.")
]


@app.command("show", no_args_is_help=True)
def show_ledger(ledger: LedgerPath) -> None:
    """Show requests, tokens and money by model and outcome, and the newest requests."""
    from alignpro.endpoints.ledger_report import describe, ledger_of

    typer.echo("\n".join(describe(ledger_of(ledger))))


@app.command("export", no_args_is_help=True)
def export_ledger(
    ledger: LedgerPath,
    out: Annotated[Path, typer.Option(help="JSON Lines file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file that is there.")] = False,
) -> None:
    """Write every request with its answers as a line of JSON."""
    from alignpro.endpoints.ledger_report import export, ledger_of

    typer.echo(f"{out}: {export(ledger_of(ledger), out, force=force)} requests")


@app.command("verify", no_args_is_help=True)
def verify_ledger(ledger: LedgerPath) -> None:
    """Check that a ledger is intact: file, hashes of texts, accounts."""
    from alignpro.endpoints.ledger_check import verify
    from alignpro.endpoints.ledger_report import ledger_of

    path = ledger_of(ledger)
    verify(path)
    typer.echo(f"ledger {path}: intact")


@app.command("purge", no_args_is_help=True)
def purge_ledger(
    ledger: LedgerPath,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove all texts for good; hashes and costs stay. What is asked again is bought again."""
    from alignpro.endpoints.ledger_purge import purge
    from alignpro.endpoints.ledger_report import ledger_of

    path = ledger_of(ledger)
    if not yes:
        typer.confirm(f"Remove all prompts and answers from {path}?", abort=True)
    typer.echo(f"ledger {path}: {purge(path)} answers purged")
