"""`alignpro rewrite`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignpro.cli.arguments import load_late
from alignpro.cli.output import show_warnings_only
from alignpro.errors import AlignProError


def rewrite(
    run: Annotated[
        Path, typer.Option(help="Run directory of a finished `alignpro train` or `sft`, or of `alignpro mix`.")
    ],
    text: Annotated[list[str] | None, typer.Argument(help="Prompts to rewrite, each one argument.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Rewrite a data source instead: a preset or a file, as in `data.source`.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="With --data: JSON Lines file to write.")] = None,
    n: Annotated[int, typer.Option(min=1, help="Rewrites per prompt.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    strength: Annotated[
        float,
        typer.Option(
            min=0,
            max=2,
            help="How far to follow training: 0 is the prompter before it, 1 the trained one. With λ in training, s acts "
            "like λ/s.",
        ),
    ] = 1.0,
    candidates: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Of a mixture, or a strength other than 0 and 1: draw so many rewrites of each prompt, and keep those that "
            "make the mixture exact over whole rewrites.",
        ),
    ] = None,
    answer: Annotated[
        bool, typer.Option("--answer", help="Also load the run's target and let it answer each rewrite.")
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Let Python code that comes with the run's models run, if the run's config says so.",
        ),
    ] = False,
    trust_endpoint: Annotated[
        bool,
        typer.Option(
            "--trust-endpoint",
            help="With --answer: let the key that the run's config names be sent to the server there.",
        ),
    ] = False,
) -> None:
    """Rewrite prompts, or a whole data set, with a trained prompter."""
    if (data is None) == (not text):
        raise AlignProError("rewrite: give prompts as arguments, or a data source with --data and --out")
    if text and not all(each.strip() for each in text):
        raise AlignProError("rewrite: a prompt is empty: there is nothing to rewrite")
    if (data is None) != (out is None):
        raise AlignProError("rewrite: --data and --out go together")
    from alignpro.environments.finished_run import require_finished_run

    require_finished_run(run)
    if data is None:
        show_warnings_only()  # the rewrites alone, without a word on what runs where
    else:
        from alignpro.config import DataConfig
        from alignpro.data.loading import check_files

        check_files(DataConfig(source=data, holdout=0))
    rewriter = load_late("alignpro.environments.rewriter:Rewriter.load")(
        run,
        with_target=answer,
        strength=strength,
        trust_remote_code=trust_remote_code,
        trust_endpoint=trust_endpoint,
    )
    if data is not None:
        load_late("alignpro.environments.rewritten_data:rewrite_data")(
            rewriter, data, out, n=n, temperature=temperature, seed=seed, candidates=candidates
        )
        return
    assert text  # or an error was raised above
    groups = rewriter.rewrite(text, n=n, temperature=temperature, seed=seed, candidates=candidates)
    for prompt, rewrites in zip(text, groups, strict=True):
        for rewritten in rewrites:
            typer.echo(rewritten.rewrite if len(text) == 1 else f"{prompt}\t{rewritten.rewrite}")
            if rewritten.response is not None:
                typer.echo(f"  → {rewritten.response}")
