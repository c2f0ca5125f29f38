"""The command-line application: its commands in the order of `alignpro --help`, and how it is run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

import alignpro
from alignpro.cli import comparing, inspecting, ledgers, mixing, models, rewriting, serving, training
from alignpro.cli.output import quiet_libraries
from alignpro.distributed.launcher import launched_rank
from alignpro.errors import AlignProError, Interrupted, PeerError

app = typer.Typer(
    help="Train a small model, the prompter, to rewrite prompts so that a frozen target model answers them better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_COMMANDS: dict[str, Callable[..., None]] = {
    "sft": training.sft,
    "reward": training.reward,
    "train": training.train,
    "rlhf": training.rlhf,
    "eval": comparing.evaluate,
    "judge": comparing.judge,
    "headroom": comparing.headroom,
    "experiment": comparing.experiment,
    "sweep": comparing.sweep,
    "rival": comparing.rival,
    "report": comparing.report,
    "optimal": comparing.optimal,
    "mix": mixing.mix,
    "pareto": mixing.pareto,
    "rewrite": rewriting.rewrite,
    "serve": serving.serve,
    "demo": inspecting.demo,
    "plan": inspecting.plan,
    "doctor": inspecting.doctor,
}
for _name, _command in _COMMANDS.items():
    app.command(_name, no_args_is_help=_command is not inspecting.doctor)(_command)
app.add_typer(models.app, name="model")
app.add_typer(ledgers.app, name="ledger")


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Set by the deepspeed launcher.")] = 0,
) -> None:
    if version:
        typer.echo(alignpro.__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. An error that the user can fix is printed as one message, with a non-zero exit status.

    Args:
        arguments: Command-line arguments; those of the process if None.

    Raises:
        SystemExit: Always; 0 on success, 128 + the signal's number after a signal.
    """
    quiet_libraries()
    try:
        app(arguments, prog_name="alignpro")
    except AlignProError as error:
        # One message for all ranks; an error that only another rank knows has been printed by that rank.
        if launched_rank() == 0 and not isinstance(error, PeerError):
            # A text from elsewhere, such as that of a reward's exception, may hold what UTF-8 cannot encode.
            message = str(error).encode("utf-8", "backslashreplace").decode("utf-8")
            typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
        sys.exit(1)
    except Interrupted as stop:
        if launched_rank() == 0:
            typer.echo(str(stop), err=True)
        sys.exit(stop.exit_code)
