"""`alignpro eval`, `judge`, `headroom`, `experiment`, `sweep`, `rival`, `report` and `optimal`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alignpro.cli.arguments import (
    DryRun,
    EvaluationArguments,
    ExperimentArguments,
    RivalArguments,
    configure,
    load_late,
)

if TYPE_CHECKING:
    from alignpro.config import ExperimentConfig


def evaluate(arguments: EvaluationArguments, dry_run: DryRun = False) -> None:
    """Compare trained models on held-out prompts.

    Arms: no fine-tuning, the prompter before and after training, Gibbs resampling, and RLHF of the target. Writes
    summary.json, rewards.json, samples.jsonl, figure.png and report.html; `alignpro report` reads the first two.
    """
    from alignpro.config import EvalConfig

    config = configure(EvalConfig, arguments, dry_run)
    if config is not None:
        load_late("alignpro.evaluation.several_targets:evaluate_targets")(config)


def judge(
    evaluations: Annotated[
        list[Path],
        typer.Argument(
            metavar="EVALUATION...",
            help="Directories of finished evaluations of several arms, or with such evaluations below.",
            show_default=False,
        ),
    ],
    config: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONFIG.yaml|key=value",
            help="Who judges, and how: repeat it for several files and overrides. By default the section `judge` of each "
            "evaluation's own config.yaml.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Judge again what has been judged.")] = False,
) -> None:
    """Let a language model compare the arms of finished evaluations, in pairs of responses and in both orders.

    Nothing is sampled again. Says how often each arm is preferred, also at equal lengths, or why the judge cannot be used.
    Writes judgements.jsonl, and adds to summary.json. The same command continues an interrupted one.
    """
    from alignpro.config import JudgeConfig, load_config

    given = load_config(JudgeConfig, config) if config else None
    judged = load_late("alignpro.evaluation.judging_directories:judge_directories")(evaluations, given, force=force)
    for directory, judgement in judged.items():
        typer.echo(str(directory))
        for sentence in judgement.sentences:
            typer.echo(f"  {sentence}")


def headroom(arguments: EvaluationArguments, dry_run: DryRun = False) -> None:
    """Measure what a prompter could gain on a task, before training it.

    Compares no fine-tuning with hand-written instructions and with the best of 4, 16 and 64 rewrites of the prompter, and
    says whether training is worth its cost. Writes summary.json and samples.jsonl.
    """
    from alignpro.config import HeadroomConfig

    config = configure(HeadroomConfig, arguments, dry_run)
    if config is not None:
        typer.echo(load_late("alignpro.evaluation.headroom:headroom")(config).table())


ListCells = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check the configuration of every cell, list the cells with those that are done, and exit.",
    ),
]
CompareOnly = Annotated[
    bool, typer.Option("--compare", help="Run nothing: compare the cells that are done, and write the report.")
]


def experiment(arguments: ExperimentArguments, dry_run: ListCells = False, compare: CompareOnly = False) -> None:
    """Train and evaluate prompters × targets × tasks × methods × seeds, each in a process of its own, and compare them.

    Cells that are done are kept: the same command continues an interrupted experiment and tries failed cells again.
    """
    from alignpro.config import ExperimentConfig, load_config

    _experiment(load_config(ExperimentConfig, arguments), dry_run, compare)


def sweep(arguments: ExperimentArguments, dry_run: ListCells = False, compare: CompareOnly = False) -> None:
    """Run an experiment's methods at each point of a grid or a random search over its keys, and compare them.

    Says which point is best on one part of the held-out prompts and what it reaches on the other, and draws reward against
    KL. It is interrupted, continued and extended as an experiment is.
    """
    from alignpro.config import SweepConfig, load_config

    _experiment(load_config(SweepConfig, arguments), dry_run, compare)


def rival(arguments: RivalArguments, dry_run: DryRun = False) -> None:
    """Search an instruction with GEPA or MIPROv2, within a number of responses of the target.

    What Align-Pro is compared with at equal target calls; needs the extra `rivals`. Writes instruction.txt and rival.json. An
    interrupted search goes on where it stopped.
    """
    from alignpro.config import RivalConfig

    config = configure(RivalConfig, arguments, dry_run)
    if config is not None:
        load_late("alignpro.experiments.rivals.run:search_instruction")(config)


def _experiment(config: ExperimentConfig, dry_run: bool, compare: bool) -> None:
    """Describe, compare or run the cells of an experiment or a sweep."""
    if dry_run:
        typer.echo("\n".join(load_late("alignpro.experiments.run:describe_plan")(config)))
    elif compare:
        load_late("alignpro.experiments.run:compare_done")(config)
    else:
        load_late("alignpro.experiments.run:run_experiment")(config)


def report(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Directories of evaluations, of experiments, or of training runs; all go into one report.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    paper: Annotated[bool, typer.Option("--paper", help="Draw the values of the paper's figure too.")] = False,
    no_texts: Annotated[
        bool, typer.Option("--no-texts", help="Show no prompts, rewrites and answers, for a report to publish.")
    ] = False,
) -> None:
    """Compare evaluations: over seeds, methods, pairs and tasks, in one HTML file.

    Says in a sentence what holds after correction for all comparisons, then who wins where, by how much and at what cost.
    """
    comparison = load_late("alignpro.evaluation.directory_report:report_directories")(
        directories, out, paper=paper, texts=not no_texts
    )
    typer.echo(comparison.verdict if comparison else "No evaluation: training curves only.")
    typer.echo(str(out))


def optimal(arguments: EvaluationArguments, dry_run: DryRun = False) -> None:
    """Resample N rewrites by their reward, without training.

    The weights are exp(R/λ), where R is the reward of the target's answers and λ is kl_coef. Writes rewrites.jsonl and
    summary.json.
    """
    from alignpro.config import OptimalConfig

    config = configure(OptimalConfig, arguments, dry_run)
    if config is not None:
        load_late("alignpro.evaluation.optimal:optimal")(config)
