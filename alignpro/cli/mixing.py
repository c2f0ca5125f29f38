"""`alignpro mix`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignpro.cli.arguments import load_late
from alignpro.errors import ConfigError


def mix(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN…", help="Run directories of `alignpro train`.")],
    out: Annotated[Path, typer.Option(help="Run directory to write, for `alignpro rewrite` and `alignpro eval`.")],
    weights: Annotated[
        str | None, typer.Option(help="One for each run, of sum 1, such as 0.7,0.3; equal by default.")
    ] = None,
    max_min: Annotated[
        bool, typer.Option("--max-min", help="Find the weights for which the least of the rewards is the largest.")
    ] = False,
    one_model: Annotated[
        bool,
        typer.Option(
            "--one-model",
            help="Of LoRAs of one base model: write one LoRA, which approximates the mixture, and say how well.",
        ),
    ] = False,
    prompts: Annotated[int, typer.Option(min=1, help="Training prompts on which the mixture is measured.")] = 32,
    rewrites: Annotated[int, typer.Option(min=2, help="Rewrites of each.")] = 16,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Let Python code that comes with the models run, if a run's config says so."
        ),
    ] = False,
) -> None:
    """Mix prompters that were trained for different rewards, from one reference with one λ, into one prompter.

    No reward is asked: each prompter is the record of its own.
    """
    found = load_late("alignpro.training.mixing:mix")(
        runs,
        out,
        weights=None if weights is None else _numbers(weights),
        max_min=max_min,
        one_model=one_model,
        prompts=prompts,
        rewrites=rewrites,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    for run, weight, reward in zip(runs, found["weights"], found["normalised_rewards"], strict=True):
        typer.echo(f"{weight:.3f}  {run}  normalised reward {reward:+.4f}")
    gap = found["gap_to_whole_rewrites"]
    typer.echo(
        f"token by token, against whole rewrites: TV {gap['total_variation']:.3f}, KL {gap['kl']:.3f} nats; "
        f"{gap['effective_sample_size']:.1f} of {found['rewrites']} rewrites count"
    )
    if single := found.get("gap_of_one_model"):
        typer.echo(f"one model, against the mixture token by token: KL {single['kl']:.3f} nats")
    typer.echo(str(out))


def _numbers(text: str) -> list[float]:
    try:
        return [float(each) for each in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"mix: --weights {text}: expected numbers with commas between, such as 0.7,0.3") from error
