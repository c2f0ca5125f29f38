"""Arguments that commands have in common, and what they do with them."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from alignpro.distributed.interrupts import exit_at_interrupt
from alignpro.distributed.launcher import launched
from alignpro.models.garbage_collection import paused_collection

if TYPE_CHECKING:
    from alignpro.config import Section


def _configuration(overrides: str, page: str) -> Any:
    return typer.Argument(
        metavar="CONFIG.yaml|key=value",
        help=f"YAML files and overrides, merged from left to right: base.yaml mine.yaml {overrides}. {page} explains the keys.",
        show_default=False,
    )


TrainingArguments = Annotated[
    list[str], _configuration("run.out=runs/mine optimizer.learning_rate=1e-4", "docs/training.md")
]
EvaluationArguments = Annotated[list[str], _configuration("out=runs/eval respond.max_tokens=64", "docs/walkthrough.md")]
ExperimentArguments = Annotated[list[str], _configuration("out=runs/experiment seeds=[0,1]", "docs/experiments.md")]
RivalArguments = Annotated[list[str], _configuration("out=runs/rival target_calls=2000", "docs/laboratory.md")]
TrainingDryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check the configuration, that models, data and rewards exist and fit, and that a checkpoint fits on the disk; "
        "print every key with its value and what would run, and exit.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check the configuration, and that models, data and rewards exist and fit; print every key with its value and what "
        "would run, and exit.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in run.out from its newest intact checkpoint.")
]
At = Annotated[
    int | None,
    typer.Option(
        min=0, metavar="STEP", help="With --resume: continue from the checkpoint of this step; later ones are deleted."
    ),
]

ConfigT = TypeVar("ConfigT", bound="Section")


def configure(kind: type[ConfigT], arguments: list[str], dry_run: bool, resume: bool = False) -> ConfigT | None:
    """Load the configuration; in a dry run, check its inputs, print it with the amount of work as comments, return None.

    Missing files are errors before torch is loaded, except where a run that is resumed may have finished, and under a
    launcher, where the ranks have to agree on errors.
    """
    from alignpro.config import dump_config, load_config

    config = load_config(kind, arguments)
    if not resume and not launched():
        from alignpro.training.input_files import check_input_files

        check_input_files(config)
    if dry_run:
        from alignpro.planning.dry_run import describe_work

        load_late("alignpro.training.preflight:check_inputs")(config)
        typer.echo(dump_config(config) + "".join(f"# {line}\n" for line in describe_work(config)), nl=False)
        return None
    return config


def load_late(path: str) -> Callable[..., Any]:
    """Import ``module:name`` late, so that `alignpro --help` and configuration errors do not wait for torch to load."""
    module, _, name = path.partition(":")
    with exit_at_interrupt(), paused_collection():
        imported = importlib.import_module(module)
    loaded: Callable[..., Any] = operator.attrgetter(name)(imported)
    return loaded
